"""A user's reward function: partial credit for an answer that is close to the right number.

    megatron-sr1 train examples/digits_cpu.yaml reward.function=examples/own_reward.py:closeness

docs/reward.md describes its arguments and what happens if it fails.
"""

from __future__ import annotations

import re


def closeness(*, response: str, gold: str, **_: object) -> float:
    r"""Return 1 minus a tenth of the error of the last \boxed{…}, at least 0."""
    boxed = re.findall(r"\\boxed\{(-?\d+)\}", response)
    if not boxed:
        return 0.0
    return max(0.0, 1.0 - abs(int(boxed[-1]) - int(gold)) / 10)
