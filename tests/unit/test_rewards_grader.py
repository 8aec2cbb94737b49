"""Whatever is put into a box, the grader gives a verdict; only gold can break it."""

import pytest

from megatron_sr1.errors import ConfigError, GradingError
from megatron_sr1.rewards import grader as grader_module
from megatron_sr1.rewards import score as score_module
from megatron_sr1.rewards.grader import Grader
from megatron_sr1.rewards.score import Scorer
from tests.grading_cases import PLAIN
from tools.fuzz_grader import fuzz

pytestmark = pytest.mark.field


@pytest.fixture
def broken_rules(monkeypatch):
    """Rules that raise on one answer, and on one gold answer whatever it is compared with."""
    real = grader_module.judge_answer

    def judge_answer(answer, gold, question, compare):
        if answer == "odd" or gold == "bad":
            raise ValueError("the moon is missing")
        return real(answer, gold, question, compare)

    monkeypatch.setattr(grader_module, "judge_answer", judge_answer)


def test_a_rule_that_raises_on_an_answer_makes_it_wrong(broken_rules):
    verdict = Grader("rules", 5.0).judge("odd", "7", PLAIN, "sample 7")
    assert not verdict and verdict.because == "uncomparable: ValueError: the moon is missing"


def test_a_rule_that_raises_on_gold_itself_raises_and_names_the_sample(broken_rules):
    with Scorer("vision_r1") as scorer:
        with pytest.raises(GradingError, match="^sample 7: the gold answer 'bad' cannot be .*moon"):
            scorer.score("sample 7", r"\boxed{7}", "bad", PLAIN, None, None, False)


def test_a_description_that_cannot_be_read_is_counted_and_unpaid(monkeypatch):
    def states_answer(description, gold, question):
        raise ValueError("the moon is missing")

    monkeypatch.setattr(score_module, "states_answer", states_answer)
    with Scorer("vision_sr1") as scorer:
        reward = scorer.score("s", r"\boxed{7}", "7", PLAIN, "3 4", None, True)
    assert reward.leak and reward.uncomparable == "ValueError: the moon is missing"
    assert reward.accuracy == 1


@pytest.mark.parametrize("kind", ["rules", "math_verify"])
def test_both_graders_know_no_box_long_text_and_missing_gold(kind):
    grader = Grader(kind, 5.0)
    assert grader.judge(None, "7", PLAIN, "s").because == "no box"
    assert grader.judge("7" * 9999, "7", PLAIN, "s").because == "too long"
    with pytest.raises(GradingError, match="gold answer is '  '"):
        grader.judge("7", "  ", PLAIN, "s")
    assert grader.worker.pid is None


def test_an_unknown_grader_is_refused():
    with pytest.raises(ConfigError, match=r"reward.grader is 'odd'; expected rules \| math_verify"):
        Grader("odd", 5.0)


def test_no_exception_leaves_the_scorer_and_nothing_outlasts_its_limit():
    found = fuzz(seed=1, count=60, num_golds=60, timeout_seconds=5.0, say=print)
    assert found.count == 60 and not found.failures


def test_the_fuzz_sees_an_exception(monkeypatch):
    real = Grader.judge

    def judge(self, answer, gold, question, sample_name):
        return real(self, answer, gold, question, sample_name) if sample_name == "start" else 1 / 0

    monkeypatch.setattr(Grader, "judge", judge)
    found = fuzz(seed=1, count=3, num_golds=3, timeout_seconds=5.0, say=print)
    assert len(found.failures) == 3 and "ZeroDivisionError" in found.failures[0]
