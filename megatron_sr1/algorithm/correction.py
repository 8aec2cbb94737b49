"""Measure and correct the mismatch between the engine that samples and the actor that is trained.

Both compute logprobs of the same tokens, which differ by kernels, precision and stale weights
(arXiv 2510.26788). Measured per token: k1 and k3 estimates of KL(engine || actor), the largest
difference, and the share of tokens with a large one. Corrected by truncated importance weights, per
token or per sequence, and by masking sequences whose mismatch is too large.

The engine's logprobs are those at sampling, the actor's (`old_logprobs`) those before this batch's
updates; shapes and types are as in losses.py.
"""

from __future__ import annotations

import math

import torch

from megatron_sr1.algorithm import losses

FAR_NATS = 0.1
"""Tokens whose logprobs differ by more are counted in `mismatch/far_share`."""


def mismatch_sums(
    engine_logprobs: torch.Tensor, actor_logprobs: torch.Tensor, loss_mask: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Sum the mismatch over target tokens.

    Returns the sums `mismatch/k1`, `mismatch/kl` (k3) and `mismatch/far_share` (tokens), and the
    maximum `mismatch/abs_max`, all scalars.
    """
    targets = loss_mask.bool()
    engine, actor = engine_logprobs[targets], actor_logprobs[targets].detach()
    gap = engine - actor
    return {
        "mismatch/k1": gap.sum(),
        "mismatch/kl": losses.k3_divergence(engine, actor).sum(),
        "mismatch/far_share": (gap.abs() > FAR_NATS).sum(),
        "mismatch/abs_max": gap.abs().max() if gap.numel() else gap.new_zeros(()),
    }


def truncated_importance_weights(
    engine_logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    loss_mask: torch.Tensor,
    cap: float,
    cu_seqlens: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return min(pi_old / pi_engine, cap), the weights of truncated importance sampling.

    Source: Ionides, JCGS 2008. The ratio is that of each token or, with `cu_seqlens`, the product
    over its sequence; `cap` is at least 1. The weights, [1, T] float32, have no gradients and are 1
    outside the targets. Multiply the advantages by them: the policy loss is homogeneous in the
    advantage.
    """
    assert cap >= 1, cap
    targets = loss_mask.bool()
    gap = torch.where(targets, old_logprobs - engine_logprobs, 0.0).detach()
    if cu_seqlens is not None:
        sums = losses.sequence_sums(gap, loss_mask, cu_seqlens)
        gap = torch.where(targets, losses.expand_to_tokens(sums, cu_seqlens), 0.0)
    return gap.clamp(max=math.log(cap)).exp()


def near_sequences(
    engine_logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    loss_mask: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_nats: float,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Mask the sequences on which engine and actor differ by more than `max_nats` (> 0) per token.

    The measure is |sum of (old - engine)| / target tokens: the logarithm of the geometric mean of
    the token ratios. A masked sequence is also left out of the denominator, as if it had not been
    sampled. Returns the mask with 0 in these sequences, and the scalars `mismatch/masked_share`
    (tokens masked) and `mismatch/num_masked_sequences`.
    """
    counts = losses.target_counts(loss_mask, cu_seqlens)
    gaps = losses.sequence_sums((old_logprobs - engine_logprobs).detach(), loss_mask, cu_seqlens)
    far = gaps.abs() > max_nats * counts
    kept = torch.where(losses.expand_to_tokens(far, cu_seqlens), 0.0, loss_mask)
    masked = loss_mask.sum() - kept.sum()
    return kept, {"mismatch/masked_share": masked, "mismatch/num_masked_sequences": far.sum()}


def weight_sums(
    weights: torch.Tensor, loss_mask: torch.Tensor, cap: float
) -> dict[str, torch.Tensor]:
    """Return the sum of the weights of target tokens, and how many are at the cap, as scalars."""
    chosen = weights[loss_mask.bool()]
    capped = chosen >= cap * (1 - 1e-6)  # exp(log(cap)) may differ from the cap by rounding
    return {"importance/weight": chosen.sum(), "importance/capped_share": capped.sum()}
