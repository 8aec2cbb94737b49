"""Rates of a held-out set that a judge saw beside the rules, and the agreement of the two.

In: lines of an evaluation, or their verdicts, with the keys that evaluation/judge.py adds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_sr1.records import RIGHT_FROM

JUDGED = ("judge", "unjudged", "accuracy_judged")
"""Keys of a line: the judge's verdict, 1, 0 or None; why there is none of an answer that was to be
judged; the final verdict."""


def judge_rates(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return how a set was judged; empty without a judge.

    `judged` and `unjudged` are the numbers of answers with and without a verdict, of those that
    were to be judged. `judge_kappa` is the agreement with the rules over those with a verdict, if
    the rules call some of these right and some wrong: where only answers that failed the rules are
    judged, there is none.
    """
    if all(line.get("accuracy_judged") is None for line in lines):
        return {}
    judged = [line for line in lines if line["judge"] is not None]
    pairs = [(line["accuracy"] >= RIGHT_FROM, line["judge"] == 1) for line in judged]
    unjudged = sum(line["unjudged"] is not None for line in lines)
    found: dict[str, float] = {"judged": len(pairs), "unjudged": unjudged}
    if len({by_rule for by_rule, _ in pairs}) == 2:
        found["judge_kappa"] = cohens_kappa(pairs)
    return found


def cohens_kappa(pairs: Sequence[tuple[bool, bool]]) -> float:
    """Return the agreement of two raters beyond chance: 1 is full, 0 is that of chance.

    Source: J. Cohen, Educational and Psychological Measurement 20 (1960). The first rater must have
    given both verdicts.
    """
    first, second = (sum(pair[rater] for pair in pairs) / len(pairs) for rater in (0, 1))
    observed = sum(one == other for one, other in pairs) / len(pairs)
    by_chance = first * second + (1 - first) * (1 - second)
    return (observed - by_chance) / (1 - by_chance)
