"""The sum of rewards, and what each recipe pays."""

import pytest

from megatron_sr1.errors import ConfigError, GradingError
from megatron_sr1.rewards import worker
from megatron_sr1.rewards.score import Scorer

QUESTION = "<image>What is the sum?"
RESPONSE = "<description> 3 5 6 </description> <think> 3 + 5 + 6 = 14 </think> \\boxed{14}"
READ_RIGHT, READ_WRONG = "<think> x </think> \\boxed{14}", "<think> x </think> \\boxed{15}"


def score(recipe="vision_sr1", **changes):
    asked = {
        "sample_name": "shard sample 7",
        "response_text": RESPONSE,
        "gold": "14",
        "question": QUESTION,
        "description": "3 5 6",
        "reading_text": READ_RIGHT,
        "has_image": True,
    }
    weights = {key: changes.pop(key) for key in list(changes) if key not in asked}
    with Scorer(recipe, **weights) as scorer:
        return scorer.score(**(asked | changes))


@pytest.mark.parametrize(
    ("changes", "parts", "total"),
    [
        ({}, (1, 1, 1), 2.0),
        ({"reading_text": READ_WRONG}, (1, 1, 0), 1.0),
        ({"gold": "15"}, (0, 1, 0), 0.1),
        ({"gold": "15", "reading_text": READ_WRONG}, (0, 1, 1), 1.1),
        ({"response_text": RESPONSE + "!"}, (1, 0, 1), 1.9),
        ({"response_text": "14", "description": None, "reading_text": None}, (0, 0, 0), 0.0),
    ],
)
def test_total_is_the_weighted_sum(changes, parts, total):
    reward = score(**changes)
    assert (reward.accuracy, reward.format, reward.self_reward) == parts
    assert reward.total == pytest.approx(total)


def test_weights_are_those_given():
    reward = score(accuracy_weight=0.5, format_weight=0.25, self_reward_weight=4.0)
    assert reward.total == pytest.approx(0.5 + 0.25 + 4.0)


def test_no_description_earns_no_self_reward_even_if_something_was_read():
    # Upstream reads the whole response then, boxed answer included, and pays.
    reward = score(description=None)
    assert (reward.self_reward, reward.reading_answer) == (0.0, None)
    assert reward.total == pytest.approx(1.0)


def test_a_text_only_sample_has_no_self_reward_and_no_share_in_the_sum():
    reward = score(has_image=False)
    assert reward.self_reward is None
    assert reward.total == pytest.approx(1.0)


def test_see_think_shows_the_reading_but_does_not_pay_it():
    read, unread = score("see_think"), score("see_think", reading_text=None)
    assert (read.self_reward, unread.self_reward) == (1.0, None)
    assert read.total == unread.total == pytest.approx(1.0)


def test_vision_r1_knows_no_description():
    thought = RESPONSE.split("</description> ")[1]
    reward = score("vision_r1", response_text=thought, description=None, reading_text=None)
    assert (reward.format, reward.self_reward) == (1.0, None)
    assert reward.total == pytest.approx(1.0)


def test_a_leak_is_flagged_and_paid_only_if_told_so():
    stated = {"description": "3 5 6, the answer is 14"}
    paid, unpaid = score(**stated), score(pay_leaks=False, **stated)
    assert paid.leak and unpaid.leak and not score().leak
    assert (paid.self_reward, unpaid.self_reward) == (1.0, 1.0)
    assert (paid.total, unpaid.total) == (pytest.approx(2.0), pytest.approx(1.0))
    assert score(pay_leaks=False).total == pytest.approx(2.0)


def test_answers_are_told_as_read():
    reward = score(reading_text=READ_WRONG)
    assert (reward.answer, reward.reading_answer) == ("14", "15")


def test_a_missing_gold_answer_is_an_error_that_names_the_sample():
    with pytest.raises(GradingError, match="shard sample 7: the gold answer is ''"):
        score(gold="")


def test_a_broken_grader_is_an_error_and_no_zero(monkeypatch):
    monkeypatch.setattr(worker.sys, "executable", "/bin/false")
    with pytest.raises(GradingError, match="^shard sample 7: comparing.*exit status 1"):
        score(gold="\\sqrt{196}")


def test_an_unknown_recipe_is_refused():
    with pytest.raises(ConfigError, match="expected vision_sr1"):
        Scorer("other")


def test_no_process_starts_for_numbers():
    scorer = Scorer("vision_sr1")
    for answer in range(30):
        text = f"<think> x </think> \\boxed{{{answer}}}"
        scorer.score("s", text, "14", QUESTION, "3 5 6", text, True)
    assert scorer._worker.pid is None
