"""Stages under context parallelism through the command line: the numbers of one process.

Two ranks share each sequence; in GRPO each of them has an engine of its own. Not covered: that
anything is learnt, longer runs (samplers part at the first token drawn otherwise).
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_sr1.demo.digits import make_digits
from megatron_sr1.observability.metrics import read_lines

ROOT = Path(__file__).resolve().parents[2]
ONE, TWO = ("launch.num_processes=1",), ("launch.num_processes=2", "parallel.context=2")
TWICE = ("rollout/distinct_readings", "rollout/reading_tokens")
"""Counts of pass 2: of two engines each reads a description that both have got."""
UNLIKE = (
    *("stage", "time/", "memory/", "perf/", *TWICE),
    "rollout/engine_steps",  # two engines take other steps than one
)


def train(output, *more):
    command = [sys.executable, "-m", "megatron_sr1", "train", ROOT / "examples/digits_cpu.yaml"]
    command += [f"output={output}", "evaluation.sets=", *more]
    done = subprocess.run(
        [str(part) for part in command], cwd=ROOT, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done


def check_alike(found, expected):
    """Every number of metrics.jsonl but times, step by step."""
    one, other = (numbers(run) for run in (expected, found))
    assert len(one) == len(other) > 0
    for before, after in zip(one, other, strict=True):
        assert after.keys() == before.keys()
        for name, value in before.items():
            assert after[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name


def numbers(run):
    lines = read_lines(run / "metrics.jsonl")
    return [{k: v for k, v in line.items() if not k.startswith(UNLIKE)} for line in lines]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    return make_digits(folder, 1, num_train=64, num_eval=8, num_cold_start=1024)


@pytest.fixture(scope="module")
def supervised(tiny_model, shards):
    """The options of a supervised run that leaves a model which answers in form, now and then."""
    return (
        *("stage=sft", f"model.path={tiny_model}", f"data.train={shards['cold_start']}"),
        *("data.prompts_per_step=64", "optimizer.num_steps=160"),
        *("optimizer.learning_rate=2e-3", "optimizer.min_learning_rate=2e-4"),
        "optimizer.warmup_steps=20",
    )


@pytest.fixture(scope="module")
def cold_start(supervised, tmp_path_factory):
    output = tmp_path_factory.mktemp("cold") / "run"
    train(output, *supervised, *TWO)
    return output / "hf"


@pytest.mark.slow
def test_a_supervised_run_has_one_process_numbers_and_goes_on_as_one(supervised, tmp_path):
    short = (*supervised, "optimizer.num_steps=4", "checkpoint.every_steps=2")
    short = (*short, "checkpoint.keep_last=0", "checkpoint.export_hf=false")
    one, two = tmp_path / "one", tmp_path / "two"
    train(one, *short, *ONE)
    train(two, *short, *TWO)
    check_alike(two, one)
    shutil.rmtree(two / "checkpoints" / "step_4")
    (two / "checkpoints" / "latest").write_text("step_2\n")
    again = train(two, *short, *ONE)
    assert "resumed from step 2" in again.stderr
    assert "saved under" in again.stderr  # another layout
    check_alike(two, one)


@pytest.mark.slow
def test_grpo_has_the_numbers_and_rollouts_of_one_process(cold_start, shards, tmp_path):
    options = (
        *(f"model.path={cold_start}", f"data.train={shards['train']}", "optimizer.num_steps=2"),
        *("data.prompts_per_step=16", "algorithm.prompts_per_update=8"),
        *("algorithm.kl_coefficient=0.01", "checkpoint.export_hf=false"),
    )
    one, two = tmp_path / "one", tmp_path / "two"
    train(one, *options, *ONE)
    train(two, *options, *TWO)
    check_alike(two, one)
    for step in (1, 2):
        before, after = (read_lines(run / f"rollouts/step_{step}.jsonl") for run in (one, two))
        assert [line["response"] for line in after] == [line["response"] for line in before]
    lines = read_lines(two / "metrics.jsonl")
    for before, after in zip(read_lines(one / "metrics.jsonl"), lines, strict=True):
        assert all(0 < before[name] <= after[name] <= 2 * before[name] for name in TWICE)
    assert all(line["optimizer/grad_norm"] > 1e-2 for line in lines)
    assert any(line["reward/total"] > 0 for line in lines), json.dumps(lines[0], indent=2)
