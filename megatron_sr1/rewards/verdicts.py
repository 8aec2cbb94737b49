"""The verdicts of an evaluation, their rates, and the table of pass 1 x pass 2.

Source: the language-shortcut rate is Vision-SR1's (arXiv 2508.19652): the share of responses that
are right with the image and wrong from their description alone.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from megatron_sr1.records import RIGHT_FROM


class Verdict(NamedTuple):
    """Name of a verdict's rate in summary.json, and its label in reports."""

    rate: str
    label: str


VERDICTS = {
    "accuracy": Verdict("accuracy", "answer right"),
    "self_reward": Verdict("self_reward", "read from description"),
    "description_exact": Verdict("description_exact", "description exact"),
    "shortcut": Verdict("shortcut_rate", "shortcut"),
}
"""Verdicts of an evaluation line."""


def rate(lines: Sequence[dict[str, Any]], verdict: str) -> float | None:
    """Return the mean of a verdict over the lines that have it; None if none has."""
    values = [line[verdict] for line in lines if line.get(verdict) is not None]
    return sum(values) / len(values) if values else None


def rates(lines: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return the rates of the verdicts that any of the lines has."""
    found = {name: rate(lines, verdict) for verdict, (name, _) in VERDICTS.items()}
    return {name: value for name, value in found.items() if value is not None}


def cross(verdicts: Iterable[tuple[float, float | None]]) -> Counter[tuple[bool, bool]]:
    """Count responses by (answer right, read from the description right).

    Args:
        verdicts: accuracy and self-reward of each response; those without a self-reward are
            skipped, one in between counts as right from 0.5 on.
    """
    return Counter(
        (accuracy >= RIGHT_FROM, self_reward >= RIGHT_FROM)
        for accuracy, self_reward in verdicts
        if self_reward is not None
    )


def is_exact(description: str, expected: Sequence[Any]) -> bool:
    """Return True if a description names the expected items in order, and no others.

    Args:
        description: text of the span.
        expected: words or digits; if all are digits, the other text is not compared.
    """
    items = [str(item).lower() for item in expected]
    pattern = "[0-9]" if all(re.fullmatch("[0-9]", item) for item in items) else r"\w+"
    return re.findall(pattern, description.lower()) == items
