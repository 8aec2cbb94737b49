"""A run that an earlier version began is resumed, loaded, converted and reported.

tests/published/run_before.tar.xz was written by commit 184c6f5: a model of 9,360 parameters, 16
conversations, and an SFT run with a checkpoint after 2 of its 4 steps. expected.json holds what
that version computed: the metrics of steps 3 and 4, and the digest of the weights that its
converter exported from the checkpoint.
"""

import hashlib
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from megatron_sr1.checkpoint.folders import resolve_model
from megatron_sr1.conversion.convert import megatron_to_hf
from tests.checkpoint_run import load, make_run

ARCHIVE = Path(__file__).resolve().parents[1] / "published" / "run_before.tar.xz"


@pytest.fixture(scope="module")
def expected():
    with tarfile.open(ARCHIVE) as archive:
        return json.load(archive.extractfile("expected.json"))


@pytest.fixture
def before(tmp_path):
    """The run, with the one key of its configuration that has another name today."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    text = (tmp_path / "sft.yaml").read_text()
    (tmp_path / "sft.yaml").write_text(text.replace("prompt_style:", "pass1_template:"))
    return tmp_path


def run_command(folder, *arguments):
    command = [sys.executable, "-m", "megatron_sr1", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def test_resuming_continues_with_the_recorded_metrics(before, expected):
    said = run_command(before, "train", "sft.yaml")
    assert "resumed from step 2" in said
    lines = [json.loads(line) for line in (before / "run" / "metrics.jsonl").open()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for line, recorded in zip(lines[2:], expected["later steps"], strict=True):
        assert line["stage"] == recorded.pop("stage")
        assert {key: line[key] for key in recorded} == pytest.approx(recorded, rel=1e-5)
    assert (before / "run" / "checkpoints" / "latest").read_text() == "step_4\n"
    assert (before / "run" / "hf" / "model.safetensors").is_file()


def test_the_checkpoint_loads_and_exports_the_recorded_weights(before, expected, groups):
    actor = make_run(before / "model", groups)
    assert load(actor, groups, before / "run" / "checkpoints")["step"] == 2
    from_run = make_run(before / "run" / "checkpoints", groups)
    for (name, tensor), (_, other) in zip(actor.weights(), from_run.weights(), strict=True):
        assert tensor.equal(other), name
    megatron_to_hf(resolve_model(before / "run" / "checkpoints"), before / "hf", True, lambda *_: 0)
    digest = hashlib.sha256((before / "hf" / "model.safetensors").read_bytes()).hexdigest()
    assert digest == expected["sha256 of the converted model.safetensors of step_2"]


def test_the_run_directory_is_reported(before):
    run_command(before, "report", "run")
    assert "5.608" in (before / "run" / "report.html").read_text()
