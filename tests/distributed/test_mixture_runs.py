"""GRPO on a text set, a set of one image and a set of several: killed, resumed, on other ranks.

Not covered: what the model learns, which a tiny one with random weights does not.
"""

import shutil
from collections import Counter

import pytest

from megatron_sr1.observability.metrics import read_lines
from tests.custom_sets import make_sets, mixture
from tests.distributed.test_resume import check_resumed, command, numbers, run_to_the_end

pytestmark = pytest.mark.slow
COUNTS = {"math12k": 7, "geometry3k": 3, "journeybench": 30}
OF_A_STEP = {"math12k": 2, "geometry3k": 1, "journeybench": 3}
"""Weights, and prompts of each step: 4 steps reach the second epoch of the first two sets."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_model):
    """Overrides, a run that was never stopped, and one that was killed after step 2; two ranks."""
    folder = tmp_path_factory.mktemp("mixture")
    more = mixture(make_sets(folder, **COUNTS), **OF_A_STEP)
    more += ["data.prompts_per_step=6", "algorithm.prompts_per_update=3"]
    more += ["rollout.samples_per_prompt=2", "checkpoint.keep_last=0"]
    return more, *check_resumed(folder, tiny_model, {}, *more)


def rollouts(run):
    return [read_lines(run / f"rollouts/step_{step}.jsonl") for step in range(1, 5)]


def test_every_step_has_each_sets_part_and_no_prompt_twice(runs):
    _, whole, _ = runs
    drawn = Counter()
    for lines in rollouts(whole):
        prompts = {line["index"]: line["set"] for line in lines}
        assert len(prompts) == 6 and Counter(prompts.values()) == OF_A_STEP
        drawn.update(prompts.keys())
    first = 0
    for name, size in COUNTS.items():
        times = [drawn[index] for index in range(first, first + size)]
        assert sum(times) == 4 * OF_A_STEP[name] and max(times) - min(times) <= 1
        first += size


def test_a_run_that_was_killed_continues_with_the_same_prompts_and_responses(runs):
    _, whole, stopped = runs
    assert rollouts(stopped) == rollouts(whole)
    assert numbers(stopped) == numbers(whole)


def test_metrics_and_report_have_the_means_of_each_set(runs):
    _, whole, _ = runs
    for line, lines in zip(numbers(whole), rollouts(whole), strict=True):
        for name in COUNTS:
            own = [one["reward"] for one in lines if one["set"] == name]
            accuracy = sum(reward["accuracy"] for reward in own) / len(own)
            assert line[f"reward/accuracy/{name}"] == pytest.approx(accuracy)
            has_images = name != "math12k"
            assert (f"reward/self_reward/{name}" in line) == has_images
    page = (whole / "report.html").read_text()
    for metric, title in {"accuracy": "Answer right", "self_reward": "Self-reward"}.items():
        drawn = f"<b>{title}, by training set</b>" in page
        is_constant = f"<td>reward/{metric}/journeybench</td>" in page
        assert drawn or is_constant, f"{metric}: neither drawn nor listed as constant"


def test_another_number_of_ranks_draws_the_same_prompts(runs, tiny_model, tmp_path):
    more, whole, _ = runs
    kept = shutil.copytree(whole / "checkpoints" / "step_2", tmp_path / "checkpoints" / "step_2")
    (kept.parent / "latest").write_text("step_2\n")
    shutil.copyfile(whole / "metrics.jsonl", tmp_path / "metrics.jsonl")
    argv = command(tmp_path, tiny_model, {}, *more, "launch.num_processes=1")
    assert "resumed from step 2" in run_to_the_end(argv).stderr
    for step in (3, 4):
        first, second = (
            read_lines(run / f"rollouts/step_{step}.jsonl") for run in (whole, tmp_path)
        )
        for one, other in zip(first, second, strict=True):
            assert all(other[name] == one[name] for name in ("index", "set", "response"))
