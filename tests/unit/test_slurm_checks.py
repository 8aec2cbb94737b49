"""What a launch script checks before a job is queued, without a Slurm.

Where Slurm's tools must answer, small programs on PATH give the answers of sinfo and sacctmgr.
The real sinfo, srun and sbatch are met in tests/distributed/test_slurm.py, the real sacctmgr in the
slow test_slurm_accounts.py beside it.
"""

import argparse
import os
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_sr1.errors import ConfigError, DataError, SR1Error
from megatron_sr1.launch.cluster import (
    Cluster,
    Task,
    add_arguments,
    cluster_of,
    split_tunnel,
    tasks_of,
)
from megatron_sr1.launch.slurm import check

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((ROOT / "examples" / "slurm").glob("*.py"))


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """Replace Slurm's tools on PATH: name -> shell commands; sbatch is there."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("bash", "id", "test"):
        (folder / name).symlink_to(shutil.which(name))
    monkeypatch.setenv("PATH", str(folder))

    def make(**commands):
        for name, text in {"sbatch": "exit 0", **commands}.items():
            (folder / name).write_text(f"#!/bin/bash\n{text}\n")
            (folder / name).chmod(0o755)

    return make


@pytest.fixture
def cluster(tmp_path):
    return Cluster(tasks_per_node=2, workdir=str(tmp_path), python=sys.executable)


@pytest.fixture
def task(tmp_path):
    """A run whose model and shards are in the working directory, with relative paths."""
    for name in ("model", "shards"):
        (tmp_path / name).mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "model.safetensors").touch()
    (tmp_path / "shards" / "shard-000000.tar").touch()
    config = tmp_path / "run.yaml"
    config.write_text("model: {path: model}\ndata: {train: shards}\nlaunch: {device: cpu}\n")
    return Task("grpo", config)


def test_a_right_submission_passes_with_paths_relative_to_the_working_directory(
    tools, cluster, task
):
    tools(sinfo="echo main; echo gpu", sacctmgr="echo lab; echo lab")
    right = replace(cluster, partition="gpu,main", account="Lab")
    assert check(right, [task])["grpo"].model.path == "model"
    with pytest.raises(SR1Error, match="no such directory"):
        check(replace(right, workdir="/"), [task])


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"overrides": ("data.trian=x",)}, ConfigError, "the nearest is 'data.train'"),
        ({"config": Path("/no/run.yaml")}, ConfigError, "no such configuration file"),
        ({"overrides": ("data.train=gone",)}, DataError, "data.train=.*gone: no such directory"),
        ({"overrides": ("parallel.tensor=4",)}, ConfigError, "1 x 2 ranks do not divide"),
    ],
)
def test_a_wrong_task_is_one_line(tools, cluster, task, change, error, says):
    tools()
    with pytest.raises(error, match=says) as caught:
        check(cluster, [replace(task, **change)])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"partition": "nope"}, "partition 'nope' is not known to this Slurm; it has gpu, main"),
        ({"account": "other"}, "account 'other' is not yours in this Slurm; yours are lab"),
        ({"container": "gone.sqsh"}, "container gone.sqsh: no such image file on this machine"),
        ({"python": "env/bin/python"}, "env/bin/python: no such program"),
        ({"tasks_per_node": 0}, "give --gpus-per-node, or --tasks-per-node"),
        ({"gpus_per_node": 2}, "launch.device=cpu asks for no GPU"),
    ],
)
def test_a_wrong_cluster_is_one_line(tools, cluster, task, change, says):
    tools(sinfo="echo main; echo gpu", sacctmgr="echo lab")
    with pytest.raises(ConfigError, match=says) as caught:
        check(replace(cluster, **change), [task])
    assert "\n" not in str(caught.value)


def test_a_check_is_skipped_if_its_tool_does_not_answer(tools, cluster, task):
    tools(sinfo="exit 1", sacctmgr="echo 'You are not running a supported plugin'; exit 1")
    check(replace(cluster, partition="nope", account="nope"), [task])


def test_a_task_that_follows_another_needs_no_model_yet(tools, cluster, task):
    tools()
    late = replace(task, overrides=("model.path=later/hf",))
    check(cluster, [replace(late, follows="sft")])
    with pytest.raises(SR1Error, match="model.path"):
        check(cluster, [late])


def test_without_sbatch_the_message_suggests_a_tunnel(tools, cluster, task, tmp_path):
    tools()
    (tmp_path / "bin" / "sbatch").unlink()
    with pytest.raises(ConfigError, match="no sbatch on this machine; .* --tunnel user@host"):
        check(cluster, [task])


@pytest.mark.skipif(shutil.which("ssh") is None, reason="no ssh here")
def test_an_unreachable_tunnel_is_one_line_at_once(cluster, task):
    with socket.socket() as closed:  # bound, not listening
        closed.bind(("127.0.0.1", 0))
        tunnel = f"me@127.0.0.1:{closed.getsockname()[1]}"
        started = time.monotonic()
        with pytest.raises(ConfigError, match=f"tunnel {tunnel} cannot be reached") as caught:
            check(replace(cluster, tunnel=tunnel), [task])
    assert time.monotonic() - started < 20
    assert "Connection refused" in str(caught.value) and "\n" not in str(caught.value)


def test_a_tunnel_is_a_user_a_host_and_perhaps_a_port():
    assert split_tunnel("me@login.lab") == ("me@login.lab", None)
    assert split_tunnel("me@login:2222") == ("me@login", 2222)
    for wrong in ("login", "@login", "me@", "me@login:ssh", "me@login:"):
        with pytest.raises(ConfigError, match="expected user@host"):
            split_tunnel(wrong)


def parsed(*argv):
    parser = argparse.ArgumentParser()
    add_arguments(parser, "run.yaml")
    return parser.parse_intermixed_args(argv)


def test_stages_become_tasks_that_follow_one_another():
    arguments = parsed("--stages", "sft,grpo", "--output", "out", "seed=2", "sft:data.train=a:b")
    first, second = tasks_of(arguments, {"grpo": ["optimizer.num_steps=5"]})
    assert first == Task(
        "sft",
        Path("run.yaml"),
        ("stage=sft", "output=out/sft", "seed=2", "data.train=a:b"),
    )
    assert (second.name, second.follows) == ("grpo", "sft")
    assert second.overrides == (
        *("stage=grpo", "optimizer.num_steps=5", "output=out/grpo"),
        *("model.path=out/sft/hf", "seed=2"),
    )


@pytest.mark.parametrize("stages", ["grpo,sft", "train", "", "sft,sft"])
def test_wrong_stages_are_refused(stages):
    with pytest.raises(ConfigError, match="expected some of sft,grpo,eval"):
        tasks_of(parsed("--stages", stages, "--output", "out"))


def test_several_stages_need_an_output_and_a_tunnel_needs_a_checkout():
    with pytest.raises(ConfigError, match="needs --output"):
        tasks_of(parsed("--stages", "sft,grpo"))
    with pytest.raises(ConfigError, match="--tunnel needs --workdir"):
        cluster_of(parsed("--tunnel", "me@login"))
    with pytest.raises(ConfigError, match="--env A: expected NAME=VALUE"):
        cluster_of(parsed("--env", "A"))


def test_a_job_is_warned_five_minutes_before_its_limit():
    assert cluster_of(parsed()).warning_seconds == 300


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_overrides_may_come_before_and_after_flags(script):
    done = subprocess.run(
        [sys.executable, script, "seed=2", "--tunnel", "me@login", "seed=3"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 2
    assert (
        done.stderr
        == f"{script.stem}: error: --tunnel needs --workdir, the checkout on the cluster\n"
    )


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_help_of_a_launch_script_is_instant_and_its_configuration_is_there(script):
    program = (
        f"import runpy, sys\nsys.argv = ['train', '--help']\n"
        f"try:\n    runpy.run_path({str(script)!r}, run_name='__main__')\n"
        "except SystemExit as end:\n    assert end.code == 0\n"
        "print([name for name in ('torch', 'nemo_run', 'omegaconf') if name in sys.modules])"
    )
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
    assert time.monotonic() - started < 5
    assert "--partition" in done.stdout


def test_the_batch_script_is_short_and_says_how_to_use_it():
    script = ROOT / "examples" / "slurm" / "train.sbatch"
    assert len(script.read_text().splitlines()) < 40
    done = subprocess.run(["bash", script], capture_output=True, text=True)
    assert done.returncode == 2 and "usage: sbatch" in done.stderr
