"""The gap between the engine that sampled and the actor that learns.

Both give logprobs of the same tokens; kernels, precision and stale weights make them differ
(arXiv 2510.26788). Reported per token: k1 and k3 estimates of KL(engine || actor), the largest
gap, and how many tokens are far apart.
"""

from __future__ import annotations

import math

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


def truncated_importance_weights(
    engine_logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    loss_mask: torch.Tensor,
    cap: float,
) -> torch.Tensor:
    """Weights that make tokens sampled by the engine count as sampled by the actor.

    min(pi_old / pi_engine, cap): truncated importance sampling (Ionides, JCGS 2008). The policy
    loss is homogeneous in the advantage, so multiply the advantages by them.

    Args:
        engine_logprobs: [1, T] float32 nats, as sampled.
        old_logprobs: [1, T] float32 nats, of the actor before this batch's updates.
        loss_mask: [1, T] float32, 1 at target tokens.
        cap: largest weight, >= 1.

    Returns:
        [1, T] float32, without gradients; 1 outside the targets.
    """
    assert cap >= 1, cap
    gap = torch.where(loss_mask.bool(), old_logprobs - engine_logprobs, 0.0).detach()
    return gap.clamp(max=math.log(cap)).exp()
