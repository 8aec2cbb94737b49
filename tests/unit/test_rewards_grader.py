"""The grader returns a verdict on any answer; only a gold answer can make it raise."""

import pytest

from megatron_sr1.config.rollout import RewardConfig
from megatron_sr1.errors import GradingError
from megatron_sr1.rewards import grader as grader_module
from megatron_sr1.rewards import score as score_module
from megatron_sr1.rewards.grader import Grader
from megatron_sr1.rewards.score import Scorer
from tests.grading_cases import PLAIN
from tests.rollout_case import case
from tools.fuzz_grader import fuzz

pytestmark = pytest.mark.field


@pytest.fixture
def broken_rules(monkeypatch):
    """Rules that raise for one answer, and for one gold answer whatever the answer."""
    real = grader_module.judge_answer

    def judge_answer(answer, gold, question, compare):
        if answer == "odd" or gold == "bad":
            raise ValueError("the moon is missing")
        return real(answer, gold, question, compare)

    monkeypatch.setattr(grader_module, "judge_answer", judge_answer)


def test_a_rule_that_raises_on_an_answer_makes_it_wrong(broken_rules):
    verdict = Grader("rules", 5.0).judge("odd", "7", PLAIN, "sample 7")
    assert not verdict.right and verdict.because == "uncomparable: ValueError: the moon is missing"


def test_a_rule_that_raises_on_gold_is_an_error_that_names_the_sample(broken_rules):
    with Scorer(RewardConfig("vision_r1")) as scorer:
        with pytest.raises(GradingError, match="^sample 7: the gold answer 'bad' cannot be .*moon"):
            scorer.score("sample 7", *case(r"\boxed{7}", "bad", PLAIN))


def test_equal_answers_to_a_question_are_judged_once(monkeypatch):
    judged, judge_answer = [], grader_module.judge_answer

    def recorded(answer, gold, question, compare):
        judged.append((answer, gold, question))
        return judge_answer(answer, gold, question, compare)

    monkeypatch.setattr(grader_module, "judge_answer", recorded)
    monkeypatch.setattr(grader_module, "MAX_KNOWN", 3)
    options = f"{PLAIN} (A) 7 (B) 8"
    asked = [("7", "7", PLAIN), ("8", "7", PLAIN), ("7", "7", PLAIN), ("A", "7", options)]
    grader = Grader("rules", 5.0)
    verdicts = [grader.judge(*each, "a sample").right for each in [*asked, ("A", "7", PLAIN)]]
    assert verdicts == [True, False, True, True, False]
    assert judged == [asked[0], asked[1], asked[3], ("A", "7", PLAIN)]
    assert grader.judge(*asked[0], "another").right and judged[-1] == asked[0], "more were kept"


def test_a_description_that_cannot_be_read_counts_as_a_leak(monkeypatch):
    def states_answer(description, gold, question, marks):
        raise ValueError("the moon is missing")

    monkeypatch.setattr(score_module, "states_answer", states_answer)
    with Scorer(RewardConfig("vision_sr1")) as scorer:
        reward = scorer.score("s", *case(r"\boxed{7}", "7", PLAIN, "3 4", None, True))
    assert reward.leak and reward.uncomparable == "ValueError: the moon is missing"
    assert reward.accuracy == 1


@pytest.mark.parametrize("kind", ["rules", "math_verify"])
def test_both_graders_handle_missing_boxes_long_text_and_missing_gold(kind):
    grader = Grader(kind, 5.0)
    assert grader.judge(None, "7", PLAIN, "s").because == "no box"
    assert grader.judge("7" * 9999, "7", PLAIN, "s").because == "too long"
    with pytest.raises(GradingError, match="gold answer is '  '"):
        grader.judge("7", "  ", PLAIN, "s")
    assert grader.worker._process is None


def test_fuzzing_finds_no_exception_and_no_exceeded_limit():
    found = fuzz(seed=1, count=60, num_golds=60, timeout_seconds=5.0, say=print)
    assert found.count == 60 and not found.failures


def test_fuzzing_detects_an_exception(monkeypatch):
    real = Grader.judge

    def judge(self, answer, gold, question, sample_name):
        return real(self, answer, gold, question, sample_name) if sample_name == "start" else 1 / 0

    monkeypatch.setattr(Grader, "judge", judge)
    found = fuzz(seed=1, count=3, num_golds=3, timeout_seconds=5.0, say=print)
    assert len(found.failures) == 3 and "ZeroDivisionError" in found.failures[0]
