r"""A reward function that replaces the total; the grader still judges both passes.

    megatron-sr1 train examples/digits_cpu.yaml reward.function=examples/reward_total.py:signed \
        reward.function_for=total 'reward.function_range=[-1,1]'

docs/reward.md describes the arguments of such functions and what happens if one fails.
"""

from __future__ import annotations


def signed(*, accuracy: float, self_reward: float | None, leak: bool) -> float:
    """Return -1 for a leak, else from -1, both passes wrong, to 1, both right."""
    if leak:
        return -1.0
    read = accuracy if self_reward is None else self_reward  # None without an image
    return accuracy + read - 1.0
