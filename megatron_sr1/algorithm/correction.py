"""The gap between the engine that sampled and the actor that learns.

Both give logprobs of the same tokens; kernels, precision and stale weights make them differ
(arXiv 2510.26788). Reported per token: k1 and k3 estimates of KL(engine || actor), the largest
gap, and how many tokens are far apart. Corrected by truncated importance weights, per token or per
sequence, and by leaving sequences out whose gap is too large.
"""

from __future__ import annotations

import math

import torch

from megatron_sr1.algorithm.losses import at_tokens, k3_divergence, sequence_sums, target_counts

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
    cu_seqlens: torch.Tensor | None = None,
) -> torch.Tensor:
    """Weights that make what the engine sampled count as sampled by the actor.

    min(pi_old / pi_engine, cap): truncated importance sampling (Ionides, JCGS 2008), of each token
    or, with borders, of each whole sequence, the product of its tokens' ratios. The policy loss is
    homogeneous in the advantage, so multiply the advantages by them.

    Args:
        engine_logprobs: [1, T] float32 nats, as sampled.
        old_logprobs: [1, T] float32 nats, of the actor before this batch's updates.
        loss_mask: [1, T] float32, 1 at target tokens.
        cap: largest weight, >= 1.
        cu_seqlens: [sequences + 1] int32, borders on the row; None: a weight for each token.

    Returns:
        [1, T] float32, without gradients; 1 outside the targets.
    """
    assert cap >= 1, cap
    targets = loss_mask.bool()
    gap = torch.where(targets, old_logprobs - engine_logprobs, 0.0).detach()
    if cu_seqlens is not None:
        whole = at_tokens(sequence_sums(gap, loss_mask, cu_seqlens), cu_seqlens)
        gap = torch.where(targets, whole, 0.0)
    return gap.clamp(max=math.log(cap)).exp()


def near_sequences(
    engine_logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    loss_mask: torch.Tensor,
    cu_seqlens: torch.Tensor,
    bound_nats: float,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The mask without the sequences on which engine and actor are too far apart.

    The measure is the mean gap a token, |sum of (old - engine)| / target tokens: the logarithm of
    the geometric mean of the tokens' ratios. A sequence that is left out leaves the denominator
    too, so that the others weigh as if it had not been sampled.

    Args:
        engine_logprobs: [1, T] float32 nats, as sampled.
        old_logprobs: [1, T] float32 nats, of the actor before this batch's updates.
        loss_mask: [1, T] float32, 1 at target tokens.
        cu_seqlens: [sequences + 1] int32, borders on the row.
        bound_nats: largest mean gap of a sequence that stays, > 0.

    Returns:
        [1, T] float32, `loss_mask` or 0; and `mismatch/masked_share`, the tokens masked, and
        `mismatch/num_masked_sequences`, scalars.
    """
    counts = target_counts(loss_mask, cu_seqlens)
    gaps = sequence_sums((old_logprobs - engine_logprobs).detach(), loss_mask, cu_seqlens)
    far = gaps.abs() > bound_nats * counts
    kept = torch.where(at_tokens(far, cu_seqlens), 0.0, loss_mask)
    reported = {
        "mismatch/masked_share": loss_mask.sum() - kept.sum(),
        "mismatch/num_masked_sequences": far.sum(),
    }
    return kept, reported


def weight_sums(
    weights: torch.Tensor, loss_mask: torch.Tensor, cap: float
) -> dict[str, torch.Tensor]:
    """Sums over target tokens of importance weights and of those at the cap.

    Args:
        weights: [1, T] float32, of `truncated_importance_weights`.
        loss_mask: [1, T] float32, 1 at target tokens.
        cap: largest weight.

    Returns:
        `importance/weight`, `importance/capped_share`, scalars.
    """
    chosen = weights[loss_mask.bool()]
    # exp(log(cap)) may miss the cap by a rounding.
    return {
        "importance/weight": chosen.sum(),
        "importance/capped_share": (chosen >= cap * (1 - 1e-6)).sum(),
    }
