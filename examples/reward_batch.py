r"""A reward function that is called once for all responses to a prompt, with two metrics.

    megatron-sr1 train examples/digits_cpu.yaml reward.arguments.tolerance=0.05 \
        reward.function=examples/reward_batch.py:within_tolerance

docs/reward.md describes the arguments of such functions and what happens if one fails.
"""

from __future__ import annotations

import re
from typing import Any


def within_tolerance(
    *, responses: list[str], gold: str, tolerance: float = 0.0
) -> list[dict[str, Any]]:
    r"""Accept a \boxed{…} number within a share of the gold one; report errors and variety."""
    boxed = [re.findall(r"\\boxed\{(-?\d+(?:\.\d+)?)\}", response)[-1:] for response in responses]
    distinct = len({value for values in boxed for value in values})
    found = []
    for values in boxed:
        error = abs(float(values[0]) - float(gold)) / max(abs(float(gold)), 1.0) if values else 1.0
        score = float(bool(values) and error <= tolerance)
        found.append({"score": score, "error": min(error, 1.0), "distinct": distinct})
    return found
