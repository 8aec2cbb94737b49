"""What a run directory says about its start."""

import json
import sys
from pathlib import Path
from subprocess import run

import torch

from megatron_sr1.config.run import Config
from megatron_sr1.runtime.start import START_FILE, start_facts
from megatron_sr1.trainer.context import Context


def test_a_run_directory_has_command_versions_and_commit(tmp_path, monkeypatch, groups):
    monkeypatch.setattr(sys, "argv", ["__main__.py", "train", "my config.yaml", "seed=3"])
    Context(Config(output=str(tmp_path)), groups, 0).open()
    facts = json.loads((tmp_path / START_FILE).read_text())
    assert facts["command"] == "megatron-sr1 train 'my config.yaml' seed=3"
    assert facts["ranks"] == 1 and facts["versions"]["torch"] == torch.__version__
    root = Path(__file__).resolve().parents[2]
    commit = run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True)
    found = facts["versions"].get("commit", "")
    assert commit.returncode != 0 or commit.stdout.startswith(found.removesuffix("-dirty"))


def test_without_git_there_is_no_commit(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert "commit" not in start_facts(1)["versions"]
