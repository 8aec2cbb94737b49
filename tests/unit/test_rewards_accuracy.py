"""Verdicts on boxed answers."""

import re
import time

import pytest

from megatron_sr1.errors import GradingError
from megatron_sr1.rewards.answers import question_options
from megatron_sr1.rewards.grader import Grader, judge_answer
from megatron_sr1.rewards.math_worker import MathWorker
from megatron_sr1.rewards.response import find_answer
from tests import grading_attacks, grading_cases, grading_forms
from tests.grading_attacks import RESPONSES
from tests.grading_cases import LOWER, MATHS, PARENS, PLAIN, Q

CASES = grading_cases.CASES + grading_forms.CASES + grading_attacks.CASES


@pytest.fixture(scope="module")
def worker():
    worker = MathWorker(60.0)
    yield worker
    worker.close()


def never(gold: str, answer: str) -> bool:
    raise AssertionError(f"{gold!r} and {answer!r} were passed to algebra")


def same_answer(answer, gold, question, compare):
    return judge_answer(answer, gold, question, compare).right


def is_right(response, gold, question, compare):
    return same_answer(find_answer(response), gold, question, compare)


def ids(cases):
    return [f"{number}-{case[-1]}" for number, case in enumerate(cases)]


def test_the_tables_hold_400_distinct_cases_with_reasons():
    assert len({case[:3] for case in CASES}) == len(CASES) >= 400
    assert all(case[4] for case in CASES)


@pytest.mark.parametrize(("gold", "answer", "question", "verdict", "reason"), CASES, ids=ids(CASES))
def test_verdict(worker, gold, answer, question, verdict, reason):
    response = f"<think> so </think> \\boxed{{{answer}}}"
    compare = lambda g, a: worker.equal(g, a, "sample")  # noqa: E731
    if answer.count("{") != answer.count("}"):
        assert same_answer(answer, gold, question, compare) is verdict, reason
    assert is_right(response, gold, question, compare) is verdict, reason


@pytest.mark.parametrize(("gold", "response", "verdict", "reason"), RESPONSES, ids=ids(RESPONSES))
def test_verdict_on_a_whole_response(gold, response, verdict, reason):
    assert is_right(response, gold, PLAIN, never) is verdict, reason


@pytest.mark.parametrize("size", [1000, 1_000_000])
def test_long_answers_are_judged_fast(size):
    started = time.process_time()
    for text in ("9", "(", "5 ", "A ", r"\\frac{", r"\\text{a}", "=", "\u200b", "½"):
        same_answer(text * (size // len(text)), "5", Q, never)
        same_answer(text * (size // len(text)), "A", Q, never)
    assert time.process_time() - started < 2.0


@pytest.mark.parametrize("gold", ["5", "None", "A", "yes"])
def test_an_answer_without_a_box_is_wrong(gold):
    for response in (gold, f"The answer is {gold}", f"\\boxed{{{gold}", "\\boxed{}", ""):
        assert not is_right(response, gold, PLAIN, never), response


def test_only_the_last_box_counts():
    assert is_right(r"\boxed{4} no, \boxed{5}", "5", PLAIN, never)
    assert not is_right(r"\boxed{5} no, \boxed{4}", "5", PLAIN, never)
    assert not is_right(r"\boxed{5} no, \boxed{4", "5", PLAIN, never)


def test_numbers_words_and_labels_are_never_passed_to_algebra():
    plain = re.compile(r"[\w\s.%'\"()-]+")
    count = 0
    for gold, answer, question, verdict, _ in CASES:
        has_product = re.search(r"\d[a-z]|_|\d-\d|--", gold + " " + answer)
        if plain.fullmatch(gold) and plain.fullmatch(answer) and not has_product:
            if question is not MATHS:
                assert same_answer(answer, gold, question, never) is verdict, (gold, answer)
                count += 1
    assert count > 80


def test_512_verdicts_on_numbers_take_milliseconds():
    started = time.process_time()
    for number in range(512):
        same_answer(str(number % 28), "14", "<image>What is the sum?", never)
    # About 20 ms on an idle core; the limit allows for slow machines.
    assert time.process_time() - started < 0.5


@pytest.mark.parametrize("gold", ["", "  ", "$$", "\\boxed{}"])
def test_an_empty_gold_answer_is_an_error(gold):
    with pytest.raises(GradingError, match="sample 7: the gold answer is"):
        Grader("rules", 5.0).judge("5", gold, PLAIN, "sample 7")


def test_options_are_parsed_in_all_notations():
    animals = {"A": "cat", "B": "dog", "C": "red fox", "D": "None of the above"}
    assert question_options(Q) == animals
    assert question_options(PARENS) == {"A": "3", "B": "4", "C": "12", "D": "1/2"}
    assert question_options(LOWER) == {"A": "left", "B": "right", "C": "both"}
    assert list(question_options(MATHS)) == ["A", "B", "C", "D"]
    assert question_options("Pick: A) x, y B) z\nAnswer briefly.") == {"A": "x, y", "B": "z"}
    assert question_options("[A] one [B] two") == {"A": "one", "B": "two"}


@pytest.mark.parametrize(
    "question", ["Is the U.S.A. or A. B. shown", "Where is A?", "What is f(a)?", PLAIN, ""]
)
def test_a_question_without_options_gives_none_or_short_text(question):
    assert not any(len(text) > 9 for text in question_options(question).values())
