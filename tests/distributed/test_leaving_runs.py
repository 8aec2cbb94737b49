"""A run that is asked to leave saves after its step, and later goes on as if it had not been.

The ranks are started by the command and its torchrun; in test_slurm.py it is Slurm that asks.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megatron_sr1.demo.digits import make_digits
from megatron_sr1.observability.metrics import read_lines
from megatron_sr1.runtime.signals import UNFINISHED

ROOT = Path(__file__).resolve().parents[2]
NUM_STEPS = 40


@pytest.fixture(scope="module")
def command(tiny_model, tmp_path_factory):
    """The command of a supervised run with no checkpoint before its end, for an output folder."""
    shards = make_digits(
        tmp_path_factory.mktemp("digits"), 1, num_train=2, num_eval=2, num_cold_start=48
    )

    def make(output, *more):
        return [
            *(sys.executable, "-m", "megatron_sr1", "sft", ROOT / "examples" / "digits_cpu.yaml"),
            *(f"output={output}", f"model.path={tiny_model}", f"data.train={shards['cold_start']}"),
            *("evaluation.sets=", "data.prompts_per_step=8", f"optimizer.num_steps={NUM_STEPS}"),
            *("checkpoint.every_steps=0", *more),
        ]

    return make


@pytest.fixture(scope="module")
def whole(command, join_as_ranks, tmp_path_factory):
    """A run that nobody disturbed."""
    output = tmp_path_factory.mktemp("whole") / "run"
    join_as_ranks(2, *command(output)[3:])
    return output


def numbers(output):
    """Lines of metrics.jsonl without times and memory."""
    lines = read_lines(output / "metrics.jsonl")
    return [
        {k: v for k, v in line.items() if not k.startswith(("time/", "memory/", "perf/"))}
        for line in lines
    ]


def rank_of(command, number):
    """The process of a rank below the command's."""
    for process in psutil.Process(command.pid).children(recursive=True):
        is_rank = process.environ().get("RANK") == str(number)
        if is_rank and "RANK" not in process.parent().environ():
            return process
    raise AssertionError(f"no rank {number}")


@pytest.mark.parametrize(
    ("number", "more"),
    [
        (signal.SIGUSR1, ()),
        pytest.param(signal.SIGTERM, ["launch.save_on_sigterm=true"], marks=pytest.mark.slow),
    ],
)
def test_a_run_asked_to_leave_saves_and_goes_on_as_if_it_had_not(
    command, whole, tmp_path, number, more
):
    output, told = tmp_path / "run", tmp_path / "unfinished"
    metrics, until = output / "metrics.jsonl", time.monotonic() + 300
    environment = {**os.environ, UNFINISHED: str(told)}
    with open(tmp_path / "log", "w") as log:
        run = subprocess.Popen(
            command(output, *more), cwd=ROOT, env=environment, stdout=log, stderr=log
        )
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 2:
        assert run.poll() is None and time.monotonic() < until, (tmp_path / "log").read_text()
        time.sleep(0.01)
    if number == signal.SIGTERM:
        run.send_signal(number)  # the launcher passes it on, and reports that it was stopped
    else:
        rank_of(run, 1).send_signal(number)  # one rank is asked, and both leave
    status = 128 + number if number == signal.SIGTERM else 0
    assert run.wait(timeout=200) == status, (tmp_path / "log").read_text()
    done = len(read_lines(metrics))
    assert 2 <= done < NUM_STEPS and told.exists()
    assert (output / "checkpoints" / "latest").read_text() == f"step_{done}\n"
    assert not (output / "hf").exists() and not (output / "failure.json").exists()
    assert f"saved step {done} of {NUM_STEPS}" in (tmp_path / "log").read_text()
    told.unlink()
    subprocess.run(command(output, *more), cwd=ROOT, env=environment, check=True, timeout=400)
    assert numbers(output) == numbers(whole) and len(numbers(output)) == NUM_STEPS
    assert (output / "hf" / "model.safetensors").is_file() and not told.exists()
