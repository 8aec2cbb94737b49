"""Descriptions that state the answer, and honest ones that have to contain it."""

import re
import time

import pytest

from megatron_sr1.rewards.leakage import states_answer
from tests.leak_cases import CASES
from tests.leak_cases_harder import HARDER, KNOWN, UNSEEN

NEW = HARDER + UNSEEN


def ids(cases):
    return [f"{number}-{case[-1]}" for number, case in enumerate(cases)]


def test_the_tables_hold_60_distinct_cases_and_more_of_both_kinds():
    assert len({case[:3] for case in CASES}) == len(CASES) >= 60
    assert min(sum(c[3] for c in CASES), sum(not c[3] for c in CASES)) >= 20
    every = CASES + NEW
    assert len({case[:3] for case in every}) == len(every) and len(NEW) >= 80


@pytest.mark.parametrize(
    ("description", "gold", "question", "verdict", "reason"), CASES + NEW, ids=ids(CASES + NEW)
)
def test_verdict(description, gold, question, verdict, reason):
    is_known = (description, gold, question, verdict, reason) in NEW and reason in KNOWN
    assert states_answer(description, gold, question) is (verdict is not is_known), reason


@pytest.mark.parametrize(
    ("cases", "precision", "recall"),
    [
        (CASES, (42, 42), (42, 42)),
        (HARDER, (34, 35), (34, 38)),
        (UNSEEN, (13, 13), (13, 18)),
    ],
    ids=["easy", "harder", "unseen"],
)
def test_precision_and_recall_are_those_of_the_documentation(cases, precision, recall):
    flagged = [case for case in cases if states_answer(*case[:3])]
    found = sum(case[3] for case in flagged)
    assert (found, len(flagged)) == precision
    assert (found, sum(case[3] for case in cases)) == recall


def test_a_list_of_digits_is_never_a_leak():
    questions = ("sum", "largest", "smallest", "leftmost", "rightmost")
    for number in range(1000):
        digits = [int(d) for d in f"{number:03d}"]
        golds = (sum(digits), max(digits), min(digits), digits[0], digits[-1])
        for kind, gold in zip(questions, golds, strict=True):
            text = " ".join(map(str, digits))
            assert not states_answer(text, str(gold), f"<image>Which digit is {kind}?"), text


@pytest.mark.parametrize(
    "text",
    ["so " * 3000, ", so 1" * 3000, "1+" * 5000, "the answer is " * 1000, "(" * 9000, " \n" * 9000]
    + ["therefore. " * 3000, "so option " * 2000, "= 1 " * 3000]
    + ["答案" * 5000, "correct " * 5000, "\u0430a" * 9000, "x" * 100_000, "answer" + " " * 30_000],
)
def test_long_descriptions_are_judged_fast(text):
    started = time.process_time()
    states_answer(text, "14", "Which? A. one B. two")
    states_answer(text, "B", "Which? A. one B. two")
    assert time.process_time() - started < 2.0


def test_a_new_value_compiles_no_pattern_whose_lead_is_absent(monkeypatch):
    """Each takes milliseconds, and data of thousands of golds has thousands of values."""
    states_answer("0 1 4", "7317", "Which digit is largest?")  # compiles what every value shares
    compiled, compile_pattern = [], re._compiler.compile

    def recorded(pattern, flags):
        compiled.append(pattern)
        return compile_pattern(pattern, flags)

    monkeypatch.setattr(re._compiler, "compile", recorded)
    assert not states_answer("0 1 4", "7318", "Which digit is largest?")
    assert len(compiled) == 1
    assert states_answer("0 1 4, so 7319", "7319", "Which digit is largest?")
    assert len(compiled) == 3
