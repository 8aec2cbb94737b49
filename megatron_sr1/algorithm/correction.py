"""The gap between the engine that sampled and the actor that learns.

Both give logprobs of the same tokens; kernels, precision and stale weights make them differ
(arXiv 2510.26788). Reported per token: k1 and k3 estimates of KL(engine || actor), the largest
gap, and how many tokens are far apart.
"""

from __future__ import annotations

import torch

from megatron_sr1.algorithm.losses import k3_divergence

FAR_NATS = 0.1
"""A token whose logprobs differ by more counts as far apart."""


def mismatch_sums(
    engine_logprobs: torch.Tensor, actor_logprobs: torch.Tensor, loss_mask: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Sums over target tokens of the engine-actor gap, and its maximum.

    Args:
        engine_logprobs: [1, T] float32 nats, as sampled.
        actor_logprobs: [1, T] float32 nats, of the same weights.
        loss_mask: [1, T] float32, 1 at target tokens.

    Returns:
        `mismatch/k1`, `mismatch/kl` (k3), `mismatch/far_share`, `mismatch/abs_max`, scalars.
    """
    targets = loss_mask.bool()
    engine, actor = engine_logprobs[targets], actor_logprobs[targets].detach()
    gap = engine - actor
    return {
        "mismatch/k1": gap.sum(),
        "mismatch/kl": k3_divergence(engine, actor).sum(),
        "mismatch/far_share": (gap.abs() > FAR_NATS).sum(),
        "mismatch/abs_max": gap.abs().max() if gap.numel() else gap.new_zeros(()),
    }
