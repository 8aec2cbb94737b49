"""Rollouts that the grader cannot judge in time are left out; those that it cannot read are wrong.

As a script on two ranks it grades on both and writes the results of each rank.
"""

import json
import logging
import sys
from pathlib import Path

import pytest

from megatron_sr1.config.rollout import RewardConfig
from megatron_sr1.config.run import Config, ModelConfig
from megatron_sr1.errors import GradingError
from megatron_sr1.records import Completion, Example, Message, Rollout
from megatron_sr1.rewards.math_worker import Uncomparable
from megatron_sr1.rewards.score import Scorer
from megatron_sr1.trainer.context import Context
from megatron_sr1.trainer.grading import gather_in_order, score, without_ungraded
from megatron_sr1.trainer.recording import reward_means

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
    with Scorer(RewardConfig("vision_r1", grader_timeout_seconds=3.0)) as scorer:
        yield scorer


def test_a_slow_rollout_excludes_its_own_group_only(scorer, caplog):
    rollouts = group(0, "1+x", SLOW, "x+1") + group(1, "x+x", "3x", "2x")
    with caplog.at_level(logging.WARNING):
        graded, limits = without_ungraded(score(rollouts, Texts(), scorer))
    assert set(limits) == {0}
    assert [(s.rollout.index, s.reward.accuracy) for s in graded] == [(1, 1), (1, 0), (1, 1)]
    (record,) = caplog.records
    assert "a.tar sample 000000 rollout 1: comparing answer '(x+y+z)^{99}'" in record.message
    assert "took more than 3 s" in record.message


def test_groups_may_be_interleaved_and_a_late_limit_excludes_what_was_scored(scorer):
    rollouts = [*group(0, "1+x"), *group(1, "x+x"), rollout(0, 1, SLOW), rollout(1, 1, "3x")]
    graded, limits = without_ungraded(score(rollouts, Texts(), scorer))
    assert set(limits) == {0}
    assert [(s.rollout.index, s.rollout.sample) for s in graded] == [(1, 0), (1, 1)]


def test_a_grader_that_breaks_raises_at_once(monkeypatch):
    monkeypatch.setattr("megatron_sr1.rewards.math_worker.sys.executable", "/bin/false")
    scorer = Scorer(RewardConfig("vision_r1"))
    with pytest.raises(GradingError, match="sample 000001 rollout 0: .*exit status 1"):
        score(group(1, "x+x"), Texts(), scorer)


@pytest.fixture
def context(tmp_path, groups):
    config = Config(stage="grpo", model=ModelConfig(path="m"), output=str(tmp_path))
    config.reward.max_ungraded_share = 0.5
    return Context(config, groups, 0)


def limits(count):
    return {index: f"sample {index} took more than 3 s" for index in range(count)}


def test_ungraded_prompts_are_counted_and_many_cause_a_warning_with_examples(context, caplog):
    with caplog.at_level(logging.WARNING):
        assert context.count_ungraded({}, 4) == 0
        assert context.count_ungraded(limits(1), 40) == 0.025
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        assert context.count_ungraded(limits(2), 4) == 0.5
    assert context.ungraded == 3
    (record,) = caplog.records
    assert "2 of 4 prompts of this step could not be graded" in record.message
    assert "sample 0 took more than 3 s; sample 1 took" in record.message


def test_only_a_share_above_the_configured_one_stops_the_run(context):
    with pytest.raises(GradingError, match="3 of 4 prompts .* share of 0.5 may .*sample 2 took"):
        context.count_ungraded(limits(3), 4)
    context.config.reward.max_ungraded_share = Config(
        stage="grpo", model=ModelConfig(path="m"), output="o"
    ).reward.max_ungraded_share
    assert context.count_ungraded(limits(4), 4) == 1.0


def test_where_nothing_could_be_graded_the_rollouts_count_as_wrong(scorer):
    scored = score(group(0, "1+x", SLOW), Texts(), scorer)
    usable, limits = without_ungraded(scored)
    assert [s.rollout.sample for s in usable] == [0, 1] and set(limits) == {0}
    assert all(s.limit and s.reward.total == 0 and s.reward.accuracy == 0 for s in usable)
    usable, limits = without_ungraded(scored + score(group(2, "5"), Texts(), scorer))
    assert [s.rollout.index for s in usable] == [2] and set(limits) == {0}


@pytest.mark.field
def test_answers_on_which_a_library_raises_are_wrong_counted_and_named(scorer, caplog, monkeypatch):
    def broken(self, gold, answer, sample_name):
        raise Uncomparable(f"KeyError: {answer}")

    monkeypatch.setattr("megatron_sr1.rewards.math_worker.MathWorker.equal", broken)
    with caplog.at_level(logging.WARNING):
        graded = score(group(0, "1+x", "x+1", "2+x", "3+x", "4+x", "5+x"), Texts(), scorer)
    assert all(s.limit is None for s in graded)
    assert [s.reward.accuracy for s in graded] == [0, 1, 0, 0, 0, 0]
    assert reward_means(graded)["reward/uncomparable"] == 5
    assert [s.reward.uncomparable for s in graded][:2] == ["KeyError: 1+x", None]
    messages = [record.message for record in caplog.records]
    assert len(messages) == 4
    assert "rollout 0: answer '1+x', gold 'x+1': KeyError: 1+x" in messages[0]
    assert messages[3].endswith("2 more in this step")


def test_gathering_gives_back_all_of_a_world_of_one(groups, scorer):
    graded = [(*s.key, s) for s in score(group(2, "5") + group(3, "6"), Texts(), scorer)]
    assert gather_in_order(graded, [3, 2], groups.world) == graded[::-1]
    assert gather_in_order([], [3, 2], groups.world) == []


def main(output):
    from megatron_sr1.config.run import ParallelConfig
    from megatron_sr1.runtime.device import select_device, start_distributed, stop_distributed
    from megatron_sr1.runtime.groups import make_groups

    device = select_device("cpu")
    start_distributed(device)
    groups = make_groups(ParallelConfig(), device)
    config = Config(stage="grpo", model=ModelConfig(path="m"), output=output)
    config.reward.max_ungraded_share = 0.5
    context = Context(config, groups, 0)
    rank = groups.world.rank
    with Scorer(RewardConfig("vision_r1", grader_timeout_seconds=2.0)) as scorer:
        mine = group(0, "1+x", SLOW) + group(1, "x+x", "3x") if rank else group(2, "5", "6")
        graded = score(mine, Texts(), scorer)
    everyone = gather_in_order([(*s.key, s) for s in graded], [1, 2, 0], groups.world)
    usable, limits = without_ungraded([scored for *_, scored in everyone])
    share_of_step = context.count_ungraded(limits, 3)
    result = {
        "share": share_of_step,
        "kept": [(s.rollout.index, s.rollout.sample) for s in usable],
        "accuracy": reward_means(usable)["reward/accuracy"],
        "ungraded": context.ungraded,
    }
    try:
        context.count_ungraded(limits, 1)
    except GradingError as error:
        result["error"] = str(error)
    (Path(output) / f"{rank}.json").write_text(json.dumps(result))
    stop_distributed()


@pytest.mark.slow
def test_all_ranks_drop_the_same_groups_and_stop_together(run_ranks, tmp_path):
    run_ranks(__file__, 2, tmp_path)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert first["kept"] == [[1, 0], [1, 1], [2, 0], [2, 1]]
    assert (first["accuracy"], first["ungraded"]) == (0.5, 1)
    assert first["share"] == pytest.approx(1 / 3)
    assert first["error"].startswith("1 of 1 prompts of this step could not be graded")


if __name__ == "__main__":
    main(sys.argv[1])
