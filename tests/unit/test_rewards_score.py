"""The weighted sum of rewards, and the rewards of each recipe."""

from dataclasses import replace

import pytest

from megatron_sr1.config.rollout import RewardConfig
from megatron_sr1.errors import GradingError
from megatron_sr1.records import Completion, Reading
from megatron_sr1.rewards import math_worker
from megatron_sr1.rewards.score import Scorer
from tests.rollout_case import case

QUESTION = "<image>What is the sum?"
RESPONSE = "<description> 3 5 6 </description> <think> 3 + 5 + 6 = 14 </think> \\boxed{14}"
READ_RIGHT, READ_WRONG = "<think> x </think> \\boxed{14}", "<think> x </think> \\boxed{15}"


def read(*texts):
    return Reading(tuple(Completion((1,), (), text, "stop") for text in texts))


def scored(*logprobs):
    return Reading((Completion(tuple(range(len(logprobs))), logprobs, "", "given"),))


def score(recipe="vision_sr1", **changes):
    asked = {
        "response": RESPONSE,
        "gold": "14",
        "question": QUESTION,
        "description": "3 5 6",
        "reading": read(READ_RIGHT),
        "has_image": True,
    }
    alone = changes.pop("question_only", None)
    weights = {key: changes.pop(key) for key in list(changes) if key not in asked}
    rollout, example = case(**(asked | changes))
    with Scorer(RewardConfig(recipe, **weights)) as scorer:
        return scorer.score("shard sample 7", replace(rollout, question_only=alone), example)


@pytest.mark.parametrize(
    ("changes", "parts", "total"),
    [
        ({}, (1, 1, 1), 2.0),
        ({"reading": read(READ_WRONG)}, (1, 1, 0), 1.0),
        ({"gold": "15"}, (0, 1, 0), 0.1),
        ({"gold": "15", "reading": read(READ_WRONG)}, (0, 1, 1), 1.1),
        ({"response": RESPONSE + "!"}, (1, 0, 1), 1.9),
        ({"response": "14", "description": None, "reading": None}, (0, 0, 0), 0.0),
    ],
)
def test_total_is_the_weighted_sum(changes, parts, total):
    reward = score(**changes)
    assert (reward.accuracy, reward.format, reward.self_reward) == parts
    assert reward.total == pytest.approx(total)


def test_weights_are_those_given():
    reward = score(accuracy_weight=0.5, format_weight=0.25, self_reward_weight=4.0)
    assert reward.total == pytest.approx(0.5 + 0.25 + 4.0)


def test_a_response_without_a_description_earns_no_self_reward():
    # Upstream then uses the whole response, boxed answer included, as the description.
    reward = score(description=None)
    assert (reward.self_reward, reward.reading_answer) == (0.0, None)
    assert reward.total == pytest.approx(1.0)


def test_a_text_only_sample_has_no_self_reward():
    reward = score(has_image=False)
    assert reward.self_reward is None
    assert reward.total == pytest.approx(1.0)


def test_see_think_reports_the_self_reward_without_adding_it():
    with_pass2, without = score("see_think"), score("see_think", reading=None)
    assert (with_pass2.self_reward, without.self_reward) == (1.0, None)
    assert with_pass2.total == without.total == pytest.approx(1.0)


def test_vision_r1_has_no_description():
    thought = RESPONSE.split("</description> ")[1]
    reward = score("vision_r1", response=thought, description=None, reading=None)
    assert (reward.format, reward.self_reward) == (1.0, None)
    assert reward.total == pytest.approx(1.0)


def test_a_leak_is_flagged_and_earns_the_self_reward_only_if_configured():
    stated = {"description": "3 5 6, the answer is 14"}
    paid, unpaid = score(**stated), score(pay_leaks=False, **stated)
    assert paid.leak and unpaid.leak and not score().leak
    assert (paid.self_reward, unpaid.self_reward) == (1.0, 1.0)
    assert (paid.total, unpaid.total) == (pytest.approx(2.0), pytest.approx(1.0))
    assert score(pay_leaks=False).total == pytest.approx(2.0)


def test_several_answers_earn_the_share_of_right_ones():
    reward = score(reading=read(READ_WRONG, READ_RIGHT, READ_RIGHT, "no box"))
    assert (reward.self_reward, reward.total) == (0.5, pytest.approx(1.5))
    assert reward.reading_answer == "15"


def test_a_likelihood_is_scaled_as_configured():
    gold = scored(-0.5, -1.5)  # mean -1, sum -2
    assert score(reading=gold).self_reward == pytest.approx(0.36787944)
    assert score(reading=gold, likelihood="probability").self_reward == pytest.approx(0.13533528)
    linear = {"likelihood": "linear", "likelihood_nats": 8.0}
    assert score(reading=gold, **linear).self_reward == pytest.approx(0.75)
    assert score(reading=scored(-5.0, -4.0), **linear).self_reward == 0.0
    assert score(reading=gold).reading_answer is None


@pytest.mark.parametrize(
    ("reading", "alone", "paid"),
    [
        (read(READ_RIGHT), read(READ_WRONG), 1.0),
        (read(READ_RIGHT), read(READ_RIGHT), 0.0),
        (read(READ_WRONG), read(READ_RIGHT), 0.0),
        (read(READ_RIGHT, READ_RIGHT), read(READ_RIGHT, READ_WRONG), 0.5),
        (scored(-0.5), scored(-1.0), 0.60653066 - 0.36787944),
    ],
)
def test_the_self_reward_is_what_the_description_adds_to_the_question(reading, alone, paid):
    reward = score(reading=reading, question_only=alone)
    assert reward.self_reward == pytest.approx(paid)
    assert reward.total == pytest.approx(1.0 + paid)


def test_the_answers_of_both_passes_are_reported():
    reward = score(reading=read(READ_WRONG))
    assert (reward.answer, reward.reading_answer) == ("14", "15")


def test_a_missing_gold_answer_is_an_error_that_names_the_sample():
    with pytest.raises(GradingError, match="shard sample 7: the gold answer is ''"):
        score(gold="")


def test_a_broken_grader_is_an_error_instead_of_a_zero(monkeypatch):
    monkeypatch.setattr(math_worker.sys, "executable", "/bin/false")
    with pytest.raises(GradingError, match="^shard sample 7: comparing.*exit status 1"):
        score(gold="\\sqrt{196}")


def test_numbers_are_judged_without_a_grading_process():
    scorer = Scorer(RewardConfig("vision_sr1"))
    for answer in range(30):
        text = f"<think> x </think> \\boxed{{{answer}}}"
        scorer.score("s", *case(text, "14", QUESTION, "3 5 6", read(text), True))
    assert scorer._grader.worker._process is None
