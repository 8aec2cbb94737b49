#!/usr/bin/env python3
"""Fuzz the grader with answers that a policy could write: tools/fuzz_grader.py --count 20000.

Each answer is a mutation of a case in tests/grading_*.py, LaTeX fragments, Unicode, or deep
nesting. The gold answers are used in turn. Each pair goes through the whole scorer: the answer as
the box of pass 1, another one as description and as the box of pass 2. The report has counts, the
slowest comparison, and each kind of exception that an answer raised, with an example. The exit
status is 1 if an exception left the scorer or a limit was exceeded.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_sr1.config.rollout import RewardConfig
from megatron_sr1.errors import GradingLimit
from megatron_sr1.records import Completion, Reading
from megatron_sr1.rewards.score import Scorer
from tests import grading_attacks, grading_cases, grading_field, grading_forms
from tests.rollout_case import case

CASES = [
    case
    for table in (grading_cases, grading_forms, grading_attacks, grading_field)
    for case in table.CASES
    if len(case[1]) < 500
]
RULES_SECONDS = 1.0
"""Limit of processor time of the rules for one rollout, in this process."""
START_SECONDS = 60.0
"""Additional time for a new grading process to load on a busy machine."""
FRAGMENTS = r"""
\frac{1}{2} \frac \frac{}{} \sqrt{} \sqrt[3]{x} \sqrt[]{} ^{ _{ } { ^^ __ \\ & \begin{pmatrix}
\end{pmatrix} \begin{cases} \end{cases} \begin{vmatrix} \end{vmatrix} \begin{array}{c} \end{array}
\left( \right) \left. \right| \int_0^1 \sum_{n=1}^{10} \prod \lim_{x\to0} \neq \ne \not= \ngtr \le
\ge < > = \in \notin \subset \cup \cap \setminus \emptyset \infty -\infty \pm \mp \times \cdot \div
\pi e i \mathbb{R} \vec{a} \hat{x} \overline{1} \dot{3} ! !! % \% ° ^\circ \log \log_2 \ln \sin \tan
\arctan \max \gcd \binom{5}{2} \choose \bmod \pmod{5} \equiv \approx \sim \to \Rightarrow \forall
\exists \neg \land \lor \text{or} \text{and} \text{ \mathrm{ \operatorname{ \boxed{ \$ $ $$ \( \) [
] ( ) \{ \} , ; : . ... \ldots \cdots | \| \lfloor \rfloor \lceil \rceil \langle \rangle ' " ` ~ *
** // / 1e9 1e-9 1e999 0x1F 1_000 nan inf zoo oo None True lambda __class__ x y z A B C (A) x_1 x^2
2x \det \operatorname{tr} A^{-1} A^T \nabla \partial \frac{d}{dx} \mathrm{d}x 1/0 0/0 0^0 (-1)^{1/2}
""".split()
CHARACTERS = (
    "≠≤≥±√π∞∑∫∈⊂∪∩≡≈→⇒∀∃¬∧∨½⅓²³₁₂°′″−–—×÷·…①ⅣＡ７　\u200b\u202e\u0301\ud800\x00\x1b\n\t🙂汉हि"
)


def nested(chance: random.Random) -> str:
    """Return a value inside many brackets, fractions, roots, powers or environments."""
    opening, closing = chance.choice(
        [
            *(("(", ")"), ("{", "}"), ("[", "]"), (r"\{", r"\}"), ("|", "|"), ("-(", ")")),
            *((r"\sqrt{", "}"), (r"\frac{1}{", "}"), ("x^{", "}"), ("x_{", "}"), ("2^{", "}")),
            *((r"\begin{pmatrix}", r"\end{pmatrix}"), (r"\left(", r"\right)"), (r"\text{", "}")),
            *((r"\sin(", ")"), ("f(", ")"), ("1<(", ")<3"), (r"\boxed{", "}"), ("(1,", ")")),
        ]
    )
    depth = chance.choice((2, 5, 15, 19, 20, 21, 60, 200))
    return opening * depth + chance.choice(("1", "x", "", "1,2")) + closing * depth


def mutated(text: str, chance: random.Random) -> str:
    """Return a text with a few pieces deleted, repeated, moved or inserted."""
    for _ in range(chance.randint(1, 4)):
        at, to = sorted((chance.randint(0, len(text)), chance.randint(0, len(text))))
        piece = text[at : min(to, at + 12)]
        match chance.randrange(6):
            case 0:
                text = text[:at] + text[at + len(piece) :]
            case 1:
                text = text[:at] + piece * chance.randint(2, 5) + text[at:]
            case 2:
                text = text[:at] + chance.choice(FRAGMENTS) + text[at:]
            case 3:
                text = text[:at] + chance.choice(CHARACTERS) + text[at:]
            case 4:
                text = text + chance.choice((" ", ",", "=", "<", " or ", "+", "")) + piece
            case _:
                text = text[:at] + str(chance.choice((0, -1, 2, 10**6, 10**30, 0.1))) + text[at:]
    return text[:3000]


def make_answer(chance: random.Random, gold: str) -> str:
    """Return the content of a box."""
    match chance.randrange(10):
        case 0 | 1 | 2:
            return mutated(gold, chance)
        case 3 | 4 | 5:
            return mutated(chance.choice(CASES)[1], chance)
        case 6:
            return chance.choice(("", " ")).join(
                chance.choice(FRAGMENTS) for _ in range(chance.randint(1, 9))
            )
        case 7:
            return nested(chance)
        case 8:
            return "".join(chance.choice(CHARACTERS) for _ in range(chance.randint(1, 12)))
        case _:
            return mutated(chance.choice((nested(chance), gold + gold)), chance)


@dataclass
class Found:
    """What happened to the rollouts.

    Attributes:
        count: rollouts scored.
        right: rollouts with a right answer.
        limits: rollouts that exceeded a limit.
        raised: exception class raised on an answer -> number of rollouts.
        examples: exception class -> one of those rollouts.
        slowest_seconds: wall time of the slowest rollout, time limits and restarts included.
        slowest_rules_seconds: largest processor time of the rules for one rollout.
        failures: exceptions that left the scorer, and exceeded time limits.
    """

    count: int = 0
    right: int = 0
    limits: int = 0
    raised: Counter[str] = field(default_factory=Counter)
    examples: dict[str, dict[str, str]] = field(default_factory=dict)
    slowest_seconds: float = 0.0
    slowest_rules_seconds: float = 0.0
    failures: list[str] = field(default_factory=list)


def fuzz(
    seed: int, count: int, num_golds: int, timeout_seconds: float, say: Callable[[str], None]
) -> Found:
    """Score `count` rollouts of mutated answers against `num_golds` gold answers in turn."""
    chance, found = random.Random(seed), Found()
    unique = list({case[0]: case for case in CASES}.values())
    golds = chance.sample(unique, min(num_golds, len(unique)))
    said = time.monotonic()
    with Scorer(RewardConfig("vision_sr1", grader_timeout_seconds=timeout_seconds)) as scorer:
        scorer.score("start", *case(r"\boxed{1+x}", "x+1"))
        for number in range(count):
            gold, _, question, _, _ = golds[number % len(golds)]
            answer, read = make_answer(chance, gold), make_answer(chance, gold)
            _score(scorer, found, (gold, question, answer, read), timeout_seconds)
            if time.monotonic() - said > 30:
                said = time.monotonic()
                say(f"{number + 1}: {found.limits} limits, {sum(found.raised.values())} raised")
    return found


def _score(
    scorer: Scorer, found: Found, asked: tuple[str, str, str, str], timeout_seconds: float
) -> None:
    gold, question, answer, read = asked
    response = f"<description> {read} </description> <think> so </think> \\boxed{{{answer}}}"
    reading = Reading(
        (Completion((1,), (-0.5,), f"<think> so </think> \\boxed{{{read}}}", "stop"),)
    )
    wall, own = time.monotonic(), time.process_time()
    what = json.dumps({"gold": gold, "question": question, "answer": answer, "read": read})
    found.count += 1
    try:
        reward = scorer.score("fuzz", *case(response, gold, question, read, reading, True))
        found.right += reward.accuracy == 1.0
        if reward.uncomparable is not None:
            kind = reward.uncomparable.split(":")[0]
            found.raised[kind] += 1
            shown = json.loads(what) | {"raised": reward.uncomparable}
            found.examples.setdefault(kind, shown)
    except GradingLimit:
        found.limits += 1
    except BaseException as error:  # a finding
        found.failures.append(f"{type(error).__name__}: {error} left the scorer: {what}")
        if not isinstance(error, Exception):
            raise
    wall, own = time.monotonic() - wall, time.process_time() - own
    found.slowest_seconds = max(found.slowest_seconds, wall)
    found.slowest_rules_seconds = max(found.slowest_rules_seconds, own)
    if wall > 2 * timeout_seconds + START_SECONDS or own > RULES_SECONDS:
        found.failures.append(f"took {wall:.1f} s, {own:.2f} s of it in the rules: {what}")


def main(arguments: list[str] | None = None) -> int:
    """Run the tool; returns its exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=20_000, help="answers")
    parser.add_argument("--golds", type=int, default=200, help="gold answers, in turn")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--timeout", type=float, default=5.0, help="seconds per comparison")
    parser.add_argument("--examples", type=Path, help="write an example per exception here")
    options = parser.parse_args(arguments)
    began = time.monotonic()
    found = fuzz(
        options.seed,
        options.count,
        options.golds,
        options.timeout,
        lambda text: print(text, flush=True),
    )
    for failure in found.failures:
        print(f"failure: {failure[:1000]}")
    for kind, times in found.raised.most_common():
        print(f"{times} raised {kind}, for example {json.dumps(found.examples[kind])[:400]}")
    if options.examples:
        lines = (json.dumps(example) + "\n" for example in found.examples.values())
        options.examples.write_text("".join(lines))
    print(
        f"seed {options.seed}: {found.count} answers against {options.golds} golds in "
        f"{time.monotonic() - began:.0f} s: {found.right} right, {found.limits} limits, "
        f"{sum(found.raised.values())} raised; the slowest took {found.slowest_seconds:.1f} s, its "
        f"rules {found.slowest_rules_seconds:.2f} s; {len(found.failures)} failures"
    )
    return 1 if found.failures else 0


if __name__ == "__main__":
    sys.exit(main())
