"""Advantages of GRPO: a reward against those of the same prompt's other responses.

Source: DeepSeekMath (arXiv 2402.03300, section 4.1.2), with a floor under the deviation.
"""

from __future__ import annotations

import numpy as np

NO_SPREAD = 1e-8
"""A group whose rewards differ by no more has no spread."""


def group_advantages(totals: np.ndarray, std_floor: float) -> tuple[np.ndarray, dict[str, float]]:
    """Normalise rewards within each group: (reward - mean) / max(std, floor).

    The floor keeps rewards that differ by rounding or by a sliver of format reward from becoming
    huge advantages; it stands in for upstream's + 1e-6. The deviation is the unbiased one (n - 1),
    as upstream's (torch.std).

    Args:
        totals: [groups, n] float, rewards.
        std_floor: smallest divisor, > 0.

    Returns:
        advantages [groups, n] float32, and `no_spread` (share of groups whose rewards are all
        equal, which teach nothing), `floored` (share divided by the floor instead), `std` (mean).
    """
    assert totals.ndim == 2 and std_floor > 0, (totals.shape, std_floor)
    centred = totals - totals.mean(axis=1, keepdims=True)
    degrees = max(totals.shape[1] - 1, 1)
    deviation = np.sqrt((centred**2).sum(axis=1, keepdims=True) / degrees)
    flat = np.ptp(totals, axis=1, keepdims=True) <= NO_SPREAD
    advantages = np.where(flat, 0.0, centred / np.maximum(deviation, std_floor))
    stats = {
        "no_spread": float(flat.mean()),
        "floored": float(((deviation < std_floor) & ~flat).mean()),
        "std": float(deviation.mean()),
    }
    return advantages.astype(np.float32), stats
