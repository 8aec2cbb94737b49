"""Answers graded per second, with and without some that hang: tools/grading_rate.py [--count N].

Prints a line for a grader that meets none that hang and for one that does: the rate of the other
answers, and how much longer those took. The answers are made here: numbers, units, option labels,
words and one formula in ten, half of them right.
"""

from __future__ import annotations

import argparse
import random
import time
from dataclasses import dataclass

from megatron_sr1.config.rollout import RewardConfig
from megatron_sr1.errors import GradingLimit
from megatron_sr1.rewards.score import Scorer
from tests.rollout_case import case

SLOW = ("x+1", "(x+y+z)^{99}")
"""Gold and an answer whose difference takes the algebra minutes to multiply out."""
QUESTION = "<image>Which one is it?\nA. cat\nB. dog\nC. red fox\nD. bird"
PLAIN = "<image>What is the value?"
WORDS = ("cat", "dog", "yes", "no", "blue", "left of it", "a red car", "10:30")


@dataclass
class Measured:
    """Times of one of two graders for the same answers; those that hang are counted apart.

    Attributes:
        start_seconds: time of the first comparison, which loads the grader.
        longest_seconds: time of the slowest answer that does not hang.
        limit_seconds: total time of the answers that reach the time limit.
    """

    start_seconds: float = 0.0
    seconds: float = 0.0
    longest_seconds: float = 0.0
    limit_seconds: float = 0.0
    num_right: int = 0
    num_limits: int = 0

    def grade(self, scorer: Scorer, name: str, gold: str, answer: str, question: str) -> None:
        """Grade one answer and count its time."""
        text, since = f"<think> so </think> \\boxed{{{answer}}}", time.monotonic()
        try:
            reward = scorer.score(name, *case(text, gold, question, has_image=True))
        except GradingLimit:
            self.num_limits += 1
            self.limit_seconds += time.monotonic() - since
            return
        took = time.monotonic() - since
        self.num_right += reward.accuracy == 1.0
        self.seconds += took
        self.longest_seconds = max(self.longest_seconds, took)


def make_answer(number: int, chance: random.Random) -> tuple[str, str, str]:
    """Return gold, answer and question; one in ten is a formula, each a different one."""
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


def measure(count: int, num_slow: int, timeout_seconds: float) -> tuple[Measured, Measured]:
    """Grade `count` answers with two graders in turn, so that load on the machine slows both.

    Only the second grader gets the `num_slow` answers that hang, evenly spread among the others.
    """
    chance = random.Random(1)
    slow_at = {(number + 1) * count // (num_slow + 1): number for number in range(num_slow)}
    found = (Measured(), Measured())
    reward = RewardConfig("vision_r1", grader_timeout_seconds=timeout_seconds)
    with Scorer(reward) as plain, Scorer(reward) as with_slow:
        pairs = list(zip(found, (plain, with_slow), strict=True))
        for measured, scorer in pairs:
            since = time.monotonic()
            scorer.score("first", *case(r"\boxed{1+x}", "x+1", PLAIN, has_image=True))
            measured.start_seconds = time.monotonic() - since
        for number in range(count):
            if number in slow_at:
                slow = slow_at[number]
                gold, answer = SLOW
                found[1].grade(with_slow, f"slow answer {slow}", gold, f"{answer}+{slow}", PLAIN)
            sample = make_answer(number, chance)
            for measured, scorer in pairs if number % 2 else reversed(pairs):
                measured.grade(scorer, f"answer {number}", *sample)
    return found


def main() -> None:
    """Measure both graders and compare them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=10_000, help="answers that do not hang")
    parser.add_argument("--slow", type=int, default=1, help="answers that do")
    parser.add_argument("--timeout", type=float, default=5.0, help="seconds per comparison")
    options = parser.parse_args()
    found = measure(options.count, options.slow, options.timeout)
    for measured in found:
        print(
            f"{options.count} answers and {measured.num_limits} that hang: "
            f"{measured.seconds:.1f} s and {measured.limit_seconds:.1f} s; {measured.num_right} "
            f"right; the others {options.count / measured.seconds:.0f} per second, the longest "
            f"{measured.longest_seconds:.2f} s; the grader loaded in {measured.start_seconds:.1f} s"
        )
    lost = 100 * (found[1].seconds / found[0].seconds - 1)
    print(f"with time-outs the others took {lost:+.1f} % more time")


if __name__ == "__main__":
    main()
