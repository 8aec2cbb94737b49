"""Print where our rules and math-verify differ over the cases in tests: tools/compare_graders.py.

The cases are those of tests/grading_*.py, whose verdicts are ours. Prints the table of
docs/rewards.md, with a line per rule: how many cases it decides, on how many the library agrees,
and examples of the others, where the library is wrong. A test compares it with the page.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterable

from megatron_sr1.errors import GradingLimit
from megatron_sr1.rewards.grader import Grader
from tests import grading_attacks, grading_cases, grading_field, grading_forms

TABLES = (grading_cases, grading_forms, grading_attacks, grading_field)
MAX_SHOWN_CHARACTERS = 40
EXAMPLES = 4
LIMIT_SECONDS = 3.0
"""Time limit of the library, which hangs in some of the cases; that counts as "wrong"."""


def main(every: bool = False) -> str:
    """Return the table; with `every`, all cases on which they differ."""
    agree: dict[str, int] = defaultdict(int)
    differ: dict[str, list[tuple[str, str, bool]]] = defaultdict(list)
    with_rules, library = Grader("rules", 60.0), Grader("math_verify", LIMIT_SECONDS)
    try:
        for gold, answer, question, wanted, _ in (c for t in TABLES for c in t.CASES):
            ours = with_rules.judge(answer or None, gold, question, "case")
            assert ours.right is wanted, (gold, answer)
            try:
                theirs = library.judge(answer or None, gold, question, "case").right
            except GradingLimit:
                theirs = False
            if theirs is wanted:
                agree[ours.because] += 1
            else:
                differ[ours.because].append((gold, answer, wanted))
    finally:
        with_rules.worker.close()
        library.worker.close()
    lines = ["| rule | cases | math-verify agrees | it errs on, for example |", "|---|---|---|---|"]
    for rule in sorted({*agree, *differ}, key=lambda r: (-len(differ[r]), r)):
        found = differ[rule] if every else _short(differ[rule])
        shown = "; ".join(_shown(*one) for one in found)
        count = agree[rule] + len(differ[rule])
        lines.append(f"| {rule} | {count} | {agree[rule]} | {shown} |")
    total, same = sum(agree.values()) + sum(map(len, differ.values())), sum(agree.values())
    lines.append(f"| all | {total} | {same} | |")
    return "\n".join(lines) + "\n"


def _short(found: Iterable[tuple[str, str, bool]]) -> list[tuple[str, str, bool]]:
    """Return a few that fit into a table, those wrongly accepted first."""
    fit = [f for f in found if max(len(f[0]), len(f[1])) <= MAX_SHOWN_CHARACTERS]
    fit = [f for f in fit if "|" not in f[0] + f[1] and f[1].isprintable()]
    accepted, refused = ([f for f in fit if f[2] is right] for right in (False, True))
    return accepted[: EXAMPLES // 2] + refused[: EXAMPLES - len(accepted[: EXAMPLES // 2])]


def _shown(gold: str, answer: str, is_right: bool) -> str:
    return f"`{gold}`, `{answer}` is {'right' if is_right else 'wrong'}"


if __name__ == "__main__":
    print(main("--every" in sys.argv[1:]), end="")
