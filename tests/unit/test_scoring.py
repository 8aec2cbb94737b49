"""Rollouts that the grader cannot judge in time: left out with their group, counted, not scored 0.

Run as a script on two ranks it grades on both and writes what each rank knows.
"""

import json
import logging
import sys
from pathlib import Path

import pytest

from megatron_sr1.config import Config, ModelConfig
from megatron_sr1.errors import GradingError
from megatron_sr1.records import Completion, Example, Message, Rollout
from megatron_sr1.rewards.score import Scorer
from megatron_sr1.trainer.context import Context
from megatron_sr1.trainer.scoring import Graded, reward_means, score, share

SLOW = "(x+y+z)^{99}"
GOLDS = ("x+1", "2x", "5", "7")


class Texts:
    """Samples without pixels: a gold answer each."""

    def example(self, index):
        turn = Message("user", "What is it?")
        return Example(index, f"{index:06d}", "a.tar", (turn,), GOLDS[index], 0)


def rollout(index, sample, answer):
    completion = Completion((1,), (-0.5,), f"<think> so </think> \\boxed{{{answer}}}", "stop")
    return Rollout(index, sample, (1, 2), completion, None, None, 0)


def group(index, *answers):
    return [rollout(index, sample, answer) for sample, answer in enumerate(answers)]


@pytest.fixture
def scorer():
    with Scorer("vision_r1", grader_timeout_seconds=3.0) as scorer:
        yield scorer


def test_a_slow_rollout_takes_its_group_along_and_no_other(scorer, caplog):
    rollouts = group(0, "1+x", SLOW, "x+1") + group(1, "x+x", "3x", "2x")
    with caplog.at_level(logging.WARNING):
        graded = score(rollouts, Texts(), scorer)
    assert graded.ungraded == {0}
    assert [(s.rollout.index, s.reward.accuracy) for s in graded.scored] == [(1, 1), (1, 0), (1, 1)]
    (record,) = caplog.records
    assert "a.tar sample 000000 rollout 1: comparing answer '(x+y+z)^{99}'" in record.message
    assert "took more than 3 s" in record.message


def test_groups_come_in_any_order_and_a_limit_late_drops_what_was_scored(scorer):
    rollouts = [*group(0, "1+x"), *group(1, "x+x"), rollout(0, 1, SLOW), rollout(1, 1, "3x")]
    graded = score(rollouts, Texts(), scorer)
    assert graded.ungraded == {0}
    assert [(s.rollout.index, s.rollout.sample) for s in graded.scored] == [(1, 0), (1, 1)]


def test_a_grader_that_breaks_raises_at_once(monkeypatch):
    monkeypatch.setattr("megatron_sr1.rewards.worker.sys.executable", "/bin/false")
    scorer = Scorer("vision_r1")
    with pytest.raises(GradingError, match="sample 000001 rollout 0: .*exit status 1"):
        score(group(1, "x+x"), Texts(), scorer)


@pytest.fixture
def context(tmp_path, groups):
    config = Config(stage="grpo", model=ModelConfig(path="m"), output=str(tmp_path))
    config.reward.max_ungraded = 3
    return Context(config, groups, None, 0)


def test_ungraded_prompts_are_counted_up_to_the_limit(context):
    context.count_ungraded(0)
    context.count_ungraded(3)
    assert context.ungraded == 3
    with pytest.raises(GradingError, match="4 prompts ungraded, at most 3 .reward.max_ungraded"):
        context.count_ungraded(1)


def test_share_gives_back_all_of_a_world_of_one(groups, scorer):
    graded = score(group(2, "5") + group(3, "6"), Texts(), scorer)
    assert share(graded, [3, 2], True, groups).scored == graded.scored[::-1]
    assert share(graded, [3, 2], False, groups) == Graded()


def main(output):
    from megatron_sr1.config import ParallelConfig
    from megatron_sr1.runtime.device import select_device, start_distributed, stop_distributed
    from megatron_sr1.runtime.groups import make_groups

    device = select_device("cpu")
    start_distributed(device)
    groups = make_groups(ParallelConfig(), device)
    config = Config(stage="grpo", model=ModelConfig(path="m"), output=output)
    config.reward.max_ungraded = 1
    context = Context(config, groups, None, 0)
    rank = groups.world.rank
    with Scorer("vision_r1", grader_timeout_seconds=2.0) as scorer:
        mine = group(0, "1+x", SLOW) + group(1, "x+x", "3x") if rank else group(2, "5", "6")
        graded = score(mine, Texts(), scorer)
    everyone = share(graded, [1, 2, 0], True, groups)
    context.count_ungraded(len(everyone.ungraded))
    told = {
        "kept": [(s.rollout.index, s.rollout.sample) for s in everyone.scored],
        "accuracy": reward_means(everyone.scored)["reward/accuracy"],
        "ungraded": context.ungraded,
    }
    try:
        context.count_ungraded(len(everyone.ungraded))
    except GradingError as error:
        told["error"] = str(error)
    (Path(output) / f"{rank}.json").write_text(json.dumps(told))
    stop_distributed()


@pytest.mark.slow
def test_all_ranks_drop_the_same_groups_and_stop_together(run_ranks, tmp_path):
    run_ranks(__file__, 2, tmp_path)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert first["kept"] == [[1, 0], [1, 1], [2, 0], [2, 1]]
    assert (first["accuracy"], first["ungraded"]) == (0.5, 1)
    assert first["error"].startswith("2 prompts ungraded, at most 1")


if __name__ == "__main__":
    main(sys.argv[1])
