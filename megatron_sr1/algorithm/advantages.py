"""Advantages: a reward against those of the same prompt's other responses.

In: rewards [groups, n], NaN where a reward is absent. Out: advantages of the same shape. Sources:
GRPO (DeepSeekMath, arXiv 2402.03300, section 4.1.2), with a floor under the deviation; Dr. GRPO
(arXiv 2503.20783, section 3.2), which does not divide; RLOO (arXiv 2402.14740), whose
baseline is the mean of the others; components normalised apart and then added (GDPO, arXiv
2601.05242, without its last normalisation over the batch).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

NO_SPREAD = 1e-8
"""A group whose rewards differ by no more has no spread."""


def group_advantages(
    rewards: np.ndarray, std_floor: float, estimator: str = "grpo"
) -> tuple[np.ndarray, dict[str, float]]:
    """Compare rewards within each group.

        grpo     (reward - mean) / max(deviation, floor)
        dr_grpo  reward - mean
        rloo     reward - mean of the others = (reward - mean) n / (n - 1)

    The floor keeps rewards that differ by rounding or by a sliver of format reward from becoming
    huge advantages; it stands in for upstream's + 1e-6. The deviation is the unbiased one (n - 1),
    as upstream's (torch.std). A group without spread, or with a single reward, has advantages 0.

    Args:
        rewards: [groups, n] float; NaN where there is none, which counts for nothing.
        std_floor: smallest divisor, > 0.
        estimator: grpo | dr_grpo | rloo.

    Returns:
        advantages [groups, n] float32, NaN where the reward is, and over the groups that have a
        reward `no_spread` (share of groups whose rewards are all equal, which teach nothing),
        `floored` (share divided by the floor instead), `std` (mean).
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
    stats = {
        "no_spread": _mean(flat, judged),
        "floored": _mean(floored, judged),
        "std": _mean(deviation, judged),
    }
    return advantages.astype(np.float32), stats


def weighted_sum(parts: Sequence[np.ndarray], weights: Sequence[float]) -> np.ndarray:
    """Join the advantages of reward components, each normalised within its groups.

    Where a component is absent, its weight goes to those that are there: a text-only sample's
    advantage is its answer's, at the strength that samples with both have.

    Args:
        parts: per component [groups, n] float32, NaN where absent; one at least is there.
        weights: per component, > 0.

    Returns:
        [groups, n] float32: sum of weight x part over the components that are there, times the sum
        of all weights over the sum of theirs.
    """
    stacked = np.stack([part.astype(np.float64) for part in parts])
    column = np.asarray(weights, np.float64)[:, None, None]
    present = ~np.isnan(stacked)
    there = (present * column).sum(axis=0)
    assert (there > 0).all(), "a sample without any reward component"
    total = np.where(present, stacked * column, 0.0).sum(axis=0)
    return (total * (column.sum() / there)).astype(np.float32)


def _mean(values: np.ndarray, chosen: np.ndarray) -> float:
    """Mean over the chosen groups, 0 if there are none."""
    return float(values[chosen].mean()) if chosen.any() else 0.0
