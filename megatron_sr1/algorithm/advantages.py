"""Advantages: rewards relative to those of the same prompt's other responses.

Rewards are [groups, n], NaN where one is absent; advantages have the same shape. Sources: GRPO
(DeepSeekMath, arXiv 2402.03300, section 4.1.2), with a minimum standard deviation; Dr. GRPO (arXiv
2503.20783, section 3.2), which does not divide; RLOO (arXiv 2402.14740), whose baseline is the mean
of the others; components that are normalised separately, then added (GDPO, arXiv 2601.05242,
without its final normalisation over the batch).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

NO_SPREAD = 1e-8
"""Rewards that differ by no more than this count as equal."""


def group_advantages(
    rewards: np.ndarray, std_floor: float, estimator: str = "grpo"
) -> tuple[np.ndarray, dict[str, float]]:
    """Compute the advantages within each group.

        grpo     (reward - mean) / max(std, std_floor)
        dr_grpo  reward - mean
        rloo     reward - mean of the others = (reward - mean) n / (n - 1)

    The floor, > 0, in place of upstream's + 1e-6, keeps tiny differences in reward (rounding, a
    small format reward) from becoming huge advantages. The standard deviation is unbiased (n - 1),
    like upstream's torch.std. The advantages are 0 in a group of equal rewards or of one reward.

    Returns:
        advantages [groups, n] float32, NaN where the reward is; and statistics over the groups with
        any reward: `no_spread` (share of groups whose rewards are all equal, so that nothing is
        learned from them), `floored` (share divided by the floor), `std` (mean).
    """
    assert rewards.ndim == 2 and std_floor > 0, (rewards.shape, std_floor)
    present = ~np.isnan(rewards)
    count = present.sum(axis=1, keepdims=True)
    mean = np.where(present, rewards, 0.0).sum(axis=1, keepdims=True) / np.maximum(count, 1)
    centred = np.where(present, rewards - mean, 0.0)
    others = np.maximum(count - 1, 1)
    deviation = np.sqrt((centred**2).sum(axis=1, keepdims=True) / others)
    largest = np.where(present, rewards, -np.inf).max(axis=1, keepdims=True)
    smallest = np.where(present, rewards, np.inf).min(axis=1, keepdims=True)
    flat = ~(largest - smallest > NO_SPREAD)
    if estimator == "grpo":
        scaled = centred / np.maximum(deviation, std_floor)
    elif estimator == "rloo":
        scaled = centred * (count / others)
    else:
        assert estimator == "dr_grpo", estimator
        scaled = centred
    advantages = np.where(present, np.where(flat, 0.0, scaled), np.nan)
    floored = (deviation < std_floor) & ~flat if estimator == "grpo" else np.zeros_like(flat)
    judged = count > 0
    found = {"no_spread": flat, "floored": floored, "std": deviation}
    stats = {k: float(v[judged].mean()) if judged.any() else 0.0 for k, v in found.items()}
    return advantages.astype(np.float32), stats


def weighted_sum(parts: Sequence[np.ndarray], weights: Sequence[float]) -> np.ndarray:
    """Add up the advantages of reward components, each normalised within its groups.

    The weight, > 0, of an absent component (NaN) goes to those that are present: the advantage of a
    text-only sample is that of its answer, on the same scale as for samples with both components.
    Each sample has at least one. The result, [groups, n] float32, is the sum of weight x part over
    the present components, times the sum of all weights / the sum of the present ones.
    """
    stacked = np.stack([part.astype(np.float64) for part in parts])
    column = np.asarray(weights, np.float64)[:, None, None]
    present = ~np.isnan(stacked)
    present_weight = (present * column).sum(axis=0)
    assert (present_weight > 0).all(), "a sample without any reward component"
    total = np.where(present, stacked * column, 0.0).sum(axis=0)
    return (total * (column.sum() / present_weight)).astype(np.float32)
