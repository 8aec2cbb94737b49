#!/usr/bin/env python3
"""Answers graded a second, with and without some that hang: tools/grading_rate.py [--count N].

In: nothing but numbers of answers. Out: lines for no time-out and for some, with the rate of the
others (time-outs taken off), and how much longer those took. The answers are made here:
numbers, units, option labels, words and one formula in ten, half of them right.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from megatron_sr1.errors import GradingLimit  # noqa: E402
from megatron_sr1.rewards.score import Scorer  # noqa: E402

SLOW = ("x+1", "(x+y+z)^{99}")
"""Gold and an answer whose difference takes the algebra minutes to multiply out."""
QUESTION = "<image>Which one is it?\nA. cat\nB. dog\nC. red fox\nD. bird"
PLAIN = "<image>What is the value?"
WORDS = ("cat", "dog", "yes", "no", "blue", "left of it", "a red car", "10:30")


@dataclass(frozen=True)
class Measured:
    """What a run over some answers took.

    Attributes:
        start_seconds: the first comparison, which loads the grader.
        seconds: wall time of the others and of those that hang.
        longest_seconds: of an answer that does not hang.
        num_right: answers found right.
        num_limits: answers that ran out of time.
    """

    start_seconds: float
    seconds: float
    longest_seconds: float
    num_right: int
    num_limits: int


def make_answer(number: int, chance: random.Random) -> tuple[str, str, str]:
    """Gold, answer, question; one formula in ten, each another one."""
    n, wrong = chance.randrange(2, 900), chance.random() < 0.5
    kind = number % 10
    if kind == 0:
        root = rf"\sqrt{{{4 * (number + 2)}}}"
        return root, rf"2\sqrt{{{number + 2 + wrong}}}", PLAIN
    if kind <= 3:
        label = chance.choice("ABCD")
        said = chance.choice(("{}", "({})", "{}.", "option {}"))
        return label, said.format(chance.choice("ABCD") if wrong else label), QUESTION
    if kind <= 6:
        return str(n), str(n + wrong), PLAIN
    if kind == 7:
        return f"{n} cm", rf"{n + wrong}\text{{ cm}}", PLAIN
    if kind == 8:
        return rf"\frac{{{n}}}{{4}}", f"{n + wrong}/4", PLAIN
    word = chance.choice(WORDS)
    return word, chance.choice(WORDS) if wrong else word.capitalize(), PLAIN


def measure(count: int, num_slow: int, timeout_seconds: float) -> Measured:
    """Grade answers, of which some hang.

    Args:
        count: answers that do not hang.
        num_slow: answers that do, spread evenly among them.
        timeout_seconds: of one comparison.
    """
    chance = random.Random(1)
    asked = [make_answer(number, chance) for number in range(count)]
    for number in range(num_slow):
        place = (number + 1) * count // (num_slow + 1)
        asked.insert(place + number, (SLOW[0], f"{SLOW[1]}+{number}", PLAIN))
    num_right, num_limits, longest = 0, 0, 0.0
    before = time.monotonic()
    with Scorer("vision_r1", grader_timeout_seconds=timeout_seconds) as scorer:
        scorer.score("first", r"\boxed{1+x}", "x+1", PLAIN, None, None, True)
        started = time.monotonic()
        for number, (gold, answer, question) in enumerate(asked):
            text, since = f"<think> so </think> \\boxed{{{answer}}}", time.monotonic()
            try:
                reward = scorer.score(f"answer {number}", text, gold, question, None, None, True)
            except GradingLimit:
                num_limits += 1
                continue
            num_right += reward.accuracy == 1.0
            longest = max(longest, time.monotonic() - since)
        seconds = time.monotonic() - started
    return Measured(started - before, seconds, longest, num_right, num_limits)


def main() -> int:
    """Measure both ways and say how they compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=10_000, help="answers that do not hang")
    parser.add_argument("--slow", type=int, default=1, help="answers that do")
    parser.add_argument("--rounds", type=int, default=3, help="the best of so many counts")
    parser.add_argument("--timeout", type=float, default=5.0, help="seconds a comparison")
    options = parser.parse_args()
    best: dict[int, float] = {}
    for _ in range(options.rounds):
        for num_slow in (0, options.slow):
            found = measure(options.count, num_slow, options.timeout)
            seconds = found.seconds - found.num_limits * options.timeout
            best[num_slow] = min(best.get(num_slow, seconds), seconds)
            print(
                f"{options.count} answers and {num_slow} that hang: {found.seconds:.1f} s, "
                f"{found.num_right} right, {found.num_limits} over the limit; "
                f"the others {options.count / seconds:.0f} a second"
            )
    lost = 100 * (best[options.slow] / best[0] - 1)
    print(f"best of {options.rounds}: with time-outs the others took {lost:+.1f} % more time")
    return 0


if __name__ == "__main__":
    sys.exit(main())
