"""Descriptions that state the answer, and honest ones that have to hold it."""

import time

import pytest

from megatron_sr1.rewards.leakage import states_answer
from tests.leak_cases import CASES


def test_the_table_holds_60_distinct_cases_of_both_kinds():
    assert len({case[:3] for case in CASES}) == len(CASES) >= 60
    assert min(sum(c[3] for c in CASES), sum(not c[3] for c in CASES)) >= 20


@pytest.mark.parametrize(("description", "gold", "question", "verdict", "reason"), CASES)
def test_verdict(description, gold, question, verdict, reason):
    assert states_answer(description, gold, question) is verdict, reason


def test_a_digits_description_is_never_a_leak():
    questions = ("sum", "largest", "smallest", "leftmost", "rightmost")
    for number in range(1000):
        digits = [int(d) for d in f"{number:03d}"]
        golds = (sum(digits), max(digits), min(digits), digits[0], digits[-1])
        for kind, gold in zip(questions, golds, strict=True):
            told = " ".join(map(str, digits))
            assert not states_answer(told, str(gold), f"<image>Which digit is {kind}?"), told


@pytest.mark.parametrize(
    "text",
    ["so " * 3000, ", so 1" * 3000, "1+" * 5000, "the answer is " * 1000, "(" * 9000, " \n" * 9000]
    + ["therefore. " * 3000, "so option " * 2000, "= 1 " * 3000],
)
def test_runaway_descriptions_take_no_time(text):
    started = time.process_time()
    states_answer(text, "14", "Which? A. one B. two")
    states_answer(text, "B", "Which? A. one B. two")
    assert time.process_time() - started < 2.0
