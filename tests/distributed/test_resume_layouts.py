"""Saved under one layout, resumed under another: samples in the same order, the same losses.

Compared with the run that was not interrupted, in the layout that saved. Not covered here: kills
(test_resume.py, test_kills.py), Transformer Engine's optimizer.
"""

import json
import shutil
from pathlib import Path

import pytest

from megatron_sr1.demo.digits import make_digits
from megatron_sr1.observability.metrics import read_lines
from tests.distributed.ranks.resumes import NUM_STEPS, PER_STEP, SAVED_STEP
from tests.distributed.test_resume import command, numbers, run_to_the_end

SCRIPT = Path(__file__).parent / "ranks" / "resumes.py"
NUM_SAMPLES = 24  # the steps after the checkpoint reach into the second epoch


@pytest.fixture(scope="module")
def runs(tiny_model, run_ranks, tmp_path_factory):
    """What resumes.py writes about each plan; `dp1` and `dp2` are data parallelism alone."""
    folder, out = tmp_path_factory.mktemp("digits"), tmp_path_factory.mktemp("runs")
    shards = make_digits(folder, 1, num_train=1, num_eval=1, num_cold_start=NUM_SAMPLES)
    common = (out, tiny_model, shards["cold_start"])
    plans = ("tp2", "tp2:tp2", "tp2:pp2", "cp2", "cp2:tp2", "dp2")
    run_ranks(SCRIPT, 2, *common, *plans, timeout=600)
    run_ranks(SCRIPT, 1, *common, "dp1", "dp2:dp1")
    run_ranks(SCRIPT, 2, *common, "dp1:dp2")
    return {path.stem: json.loads(path.read_text()) for path in out.glob("*.json")}


@pytest.mark.parametrize("plan", ["tp2:pp2", "cp2:tp2", "dp2:dp1", "dp1:dp2"])
def test_a_run_resumed_under_another_layout_has_the_losses_of_one_never_stopped(runs, plan):
    """Gradient norms too, and what the schedule gives, so that the optimizer's state is there."""
    whole, resumed = runs[plan.split(":")[0]]["lines"], runs[plan]["lines"]
    assert [line["step"] for line in whole] == list(range(1, NUM_STEPS + 1))
    assert resumed[:SAVED_STEP] == whole[:SAVED_STEP]
    for before, after in zip(whole, resumed, strict=True):
        assert after == pytest.approx(before, rel=1e-6)


def test_a_run_resumed_under_the_same_layout_is_the_same_bit_for_bit(runs):
    """Lines, and the last checkpoint's weights, optimizer and generators."""
    whole, resumed = runs["tp2"], runs["tp2:tp2"]
    assert resumed["lines"] == whole["lines"]
    named_by_time = {".metadata"}  # it holds a name that each writing makes up
    assert {"__1_0.distcp", "rng_1.pt"} < set(whole["files"]) - named_by_time
    for name in set(whole["files"]) - named_by_time:
        assert resumed["files"][name] == whole["files"][name], name


@pytest.mark.parametrize("plan", ["tp2:pp2", "cp2:tp2", "dp2:dp1", "dp1:dp2", "tp2:tp2"])
def test_steps_learn_from_the_same_samples_each_once_an_epoch(runs, plan):
    saved, resumed = runs[plan.split(":")[0]]["order"], runs[plan]["order"]
    assert list(resumed) == [str(step) for step in range(SAVED_STEP + 1, NUM_STEPS + 1)]
    assert resumed == {step: saved[step] for step in resumed}
    read = sum((saved[str(step)] for step in range(1, SAVED_STEP + 1)), [])
    read += sum(resumed.values(), [])
    assert len(read) == NUM_STEPS * PER_STEP > NUM_SAMPLES
    inside = read[: NUM_SAMPLES // PER_STEP * PER_STEP]  # of the first epoch, whole steps
    assert len(set(inside)) == len(inside)
    assert set(read) == set(range(NUM_SAMPLES)) and max(map(read.count, read)) == 2


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    return make_digits(folder, 1, num_train=20, num_eval=1, num_cold_start=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("saving", "resuming"),
    [
        (["parallel.tensor=2"], ["parallel.pipeline=2"]),
        (["launch.num_processes=2"], ["launch.num_processes=1"]),
    ],
    ids=["tp2:pp2", "dp2:dp1"],
)
def test_grpo_goes_on_under_another_layout(tmp_path, tiny_model, prompts, saving, resuming):
    """The same prompts and responses, and the same losses; two replicas of the engine become one.

    A response may differ where two tokens were as likely to 1e-6; none is here.
    """
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    more = ["data.prompts_per_step=6", "algorithm.prompts_per_update=3", "checkpoint.keep_last=0"]
    more += ["algorithm.kl_coefficient=0.01"]
    run_to_the_end(command(whole, tiny_model, prompts, *more, *saving))
    kept = shutil.copytree(whole / "checkpoints" / "step_2", stopped / "checkpoints" / "step_2")
    (kept.parent / "latest").write_text("step_2\n")
    shutil.copyfile(whole / "metrics.jsonl", stopped / "metrics.jsonl")
    done = run_to_the_end(command(stopped, tiny_model, prompts, *more, *resuming))
    assert "resumed from step 2" in done.stderr
    for step in (3, 4):
        first, second = (
            read_lines(run / f"rollouts/step_{step}.jsonl") for run in (whole, stopped)
        )
        for one, other in zip(first, second, strict=True):
            assert other["response"] == one["response"] and other["index"] == one["index"]
    for before, after in zip(numbers(whole), numbers(stopped), strict=True):
        for name in ("actor/loss", "actor/reference_kl", "optimizer/grad_norm", "reward/total"):
            assert after[name] == pytest.approx(before[name], rel=1e-5, abs=1e-5), name


@pytest.mark.slow
def test_adapters_are_resumed_under_another_layout_and_with_dropout_bit_for_bit(
    tiny_model, run_ranks, tmp_path
):
    shards = make_digits(tmp_path, 1, num_train=1, num_eval=1, num_cold_start=NUM_SAMPLES)
    common = (tmp_path / "out", tiny_model, shards["cold_start"])
    others = ("tp2a:pp2a", "tp2a:cp2a", "cp2a:tp2a")
    run_ranks(SCRIPT, 2, *common, "tp2a", "cp2a", "dp2a", *others, "tp2d", "tp2d:tp2d", timeout=600)
    run_ranks(SCRIPT, 1, *common, "dp2a:dp1a")
    found = {path.stem: json.loads(path.read_text()) for path in common[0].glob("*.json")}
    for plan in (*others, "dp2a:dp1a"):
        whole, resumed = found[plan.split(":")[0]]["lines"], found[plan]["lines"]
        assert len(whole) == NUM_STEPS and whole[-1]["optimizer/grad_norm"] > 0
        for before, after in zip(whole, resumed, strict=True):
            assert after == pytest.approx(before, rel=1e-5), plan
    assert found["tp2d:tp2d"]["lines"] == found["tp2d"]["lines"] != found["tp2a"]["lines"]
    for name in set(found["tp2d"]["files"]) - {".metadata"}:
        assert found["tp2d:tp2d"]["files"][name] == found["tp2d"]["files"][name], name
