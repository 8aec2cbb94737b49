"""A reward function of one's own: an answer that is off by a little earns a little.

    megatron-sr1 train examples/digits_cpu.yaml reward.function=examples/own_reward.py:closeness

docs/reward.md says what it is given and what a failure does.
"""

from __future__ import annotations

import re


def closeness(*, response: str, gold: str, **_: object) -> float:
    r"""1 for the right number, less for each by which the last \boxed{…} is off, 0 from 10 on."""
    boxed = re.findall(r"\\boxed\{(-?\d+)\}", response)
    if not boxed:
        return 0.0
    return max(0.0, 1.0 - abs(int(boxed[-1]) - int(gold)) / 10)
