"""Evaluations as a run makes them: they change nothing of the training, and need little memory."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megatron_sr1.demo.digits import make_digits
from megatron_sr1.observability.metrics import read_lines

ROOT = Path(__file__).resolve().parents[2]
OWN = ("evaluation/", "time/", "perf/", "memory/")
NUM_QUESTIONS = 5000


@pytest.fixture(scope="module")
def train(demo, join_as_ranks, tmp_path_factory):
    """Train the demo's cold start on two ranks; returns the metrics without times."""

    def run(name, *overrides):
        output = tmp_path_factory.mktemp(name)
        join_as_ranks(
            *(2, "train", ROOT / "examples" / "digits_cpu.yaml", f"output={output}"),
            *(f"model.path={demo / 'cold_start' / 'hf'}", "optimizer.num_steps=3"),
            *("checkpoint.every_steps=0", "checkpoint.export_hf=false", "evaluation.sets="),
            *overrides,
        )
        return read_lines(output / "metrics.jsonl")

    return run


def of_training(lines):
    return [
        {name: value for name, value in line.items() if not name.startswith(OWN)}
        for line in lines
        if line["step"]
    ]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["grpo", "sft"])
def test_validation_changes_nothing_of_the_training(train, demo, stage):
    data, held_out = demo / "data", []
    for name, temperature in (("greedy", 0), ("sampled", 1)):
        held_out += [f"evaluation.sets.{name}.path={data / 'eval'}"]
        held_out += [f"evaluation.sets.{name}.temperature={temperature}"]
    held_out += ["evaluation.every_steps=1", "evaluation.at_start=true"]
    held_out += ["evaluation.max_samples=40", "evaluation.chunk_prompts=30"]
    own = [f"data.train={data / 'train'}"]
    if stage == "sft":
        own = ["stage=sft", f"data.train={data / 'cold_start'}", "evaluation.generate=true"]
        held_out += [f"evaluation.sets.loss.path={data / 'cold_start'}"]
    plain, validated = train(f"{stage}_plain", *own), train(f"{stage}_validated", *own, *held_out)
    assert of_training(plain) == of_training(validated) and len(plain) == 3
    assert [line["step"] for line in validated] == [0, 1, 2, 3]
    assert all("evaluation/sampled/accuracy" in line for line in validated)
    if stage == "sft":
        losses = [line["evaluation/loss/loss"] for line in validated]
        assert losses[0] != losses[3] and 0 < losses[3] < 1


@pytest.mark.slow
def test_memory_of_5000_questions_with_images_is_flat(demo, tmp_path):
    shards = make_digits(tmp_path, 1, num_train=2, num_eval=NUM_QUESTIONS, num_cold_start=2)
    command = [sys.executable, "-m", "megatron_sr1", "eval", "examples/digits_cpu.yaml"]
    command += [f"model.path={demo / 'cold_start' / 'hf'}", f"output={tmp_path / 'run'}"]
    command += ["launch.num_processes=1", "evaluation.chunk_prompts=100", "evaluation.sets="]
    command += [f"evaluation.sets.many.path={shards['eval']}", "evaluation.max_samples=0"]
    written = tmp_path / "run" / "eval" / "many.jsonl.partial"
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    resident = []  # [lines, bytes]
    with subprocess.Popen(command, cwd=ROOT, env=environment) as process:
        while process.poll() is None:
            if written.is_file():
                lines = written.read_bytes().count(b"\n")
                resident.append((lines, psutil.Process(process.pid).memory_info().rss))
            time.sleep(0.2)
    assert process.returncode == 0
    assert len(read_lines(written.with_suffix(""))) == NUM_QUESTIONS
    early = max(size for lines, size in resident if lines <= NUM_QUESTIONS / 10)
    late = [size for lines, size in resident if lines > NUM_QUESTIONS / 10]
    assert len(late) > 20 and max(late) <= 1.05 * early
