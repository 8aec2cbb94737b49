"""Losses over packed tokens, as sums; the caller divides by the update's denominator.

In: logprobs [1, T] float32 of the labels, numbers per token, a mask. Out: a scalar sum with
gradients, and detached sums to report. What a token weighs in the sum and what the sum is divided
by is reduction.py's. Sources: PPO's clipped ratio (arXiv 1707.06347, equation 7), the dual clip
(arXiv 1912.09729, equation 5), the k3 estimator (Schulman, "Approximating KL divergence", 2020),
as Vision-SR1 combines them (arXiv 2508.19652).
"""

from __future__ import annotations

import torch

RATIO_LOG_BOUND = 20.0
"""|log ratio| is cut here before exp: far outside any clip, it keeps exp finite in float32."""


def policy_loss(
    policy_logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    loss_mask: torch.Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
    reference_logprobs: torch.Tensor | None = None,
    kl_coefficient: float = 0.0,
    log_ratios: torch.Tensor | None = None,
    token_weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Clipped policy loss plus KL to the reference, summed over target tokens.

    No denominator and no rank's share is applied here: the sum of a micro-batch is added to those
    of the other micro-batches and data-parallel ranks, then divided (trainer/step.py).

    Args:
        policy_logprobs: [1, T] float32 nats, with gradients.
        old_logprobs: [1, T] float32 nats, of the weights that the batch is on-policy for.
        advantages: [1, T] float32.
        loss_mask: [1, T] float32, 1 at target tokens; the rest has no value and no gradient.
        clip_low: the ratio is clipped below at 1 - clip_low.
        clip_high: the ratio is clipped above at 1 + clip_high.
        dual_clip: for negative advantages the loss is at most dual_clip x |advantage|.
        reference_logprobs: [1, T] float32 nats, or None.
        kl_coefficient: weight of the KL term.
        log_ratios: [1, T] float32 nats, with gradients, logarithm of the ratio that is clipped;
            None: policy - old, of each token.
        token_weights: [1, T] float32, of a token's loss, KL included, in the sum; None: 1.

    Returns:
        the sum, a scalar; and unweighted sums over target tokens: `clipped_share`,
        `dual_clipped_share`, `old_kl` (k1, old against policy), with a reference `reference_kl`
        (k3), and `ratio_max`.
    """
    targets = loss_mask.bool()
    policy = policy_logprobs[targets]
    old, advantage = old_logprobs[targets], advantages[targets]
    # All [targets]; positive loss is bad; no denominator here.
    log_ratio = policy - old if log_ratios is None else log_ratios[targets]
    ratio = log_ratio.clamp(-RATIO_LOG_BOUND, RATIO_LOG_BOUND).exp()
    plain = -advantage * ratio
    clipped = -advantage * ratio.clamp(1 - clip_low, 1 + clip_high)
    worse = torch.maximum(plain, clipped)
    bounded = torch.minimum(worse, -advantage * dual_clip)
    negative = advantage < 0
    loss = torch.where(negative, bounded, worse)
    reported = {
        "clipped_share": (clipped > plain).sum(),
        "dual_clipped_share": (negative & (bounded < worse)).sum(),
        "old_kl": (old - policy).sum(),
        "ratio_max": ratio.max() if ratio.numel() else ratio.new_zeros(()),
    }
    if reference_logprobs is not None:
        divergence = k3_divergence(policy, reference_logprobs[targets])
        loss = loss + kl_coefficient * divergence
        reported["reference_kl"] = divergence.sum()
    if token_weights is not None:
        loss = loss * token_weights[targets]
    return loss.sum(), {name: value.detach() for name, value in reported.items()}


def k3_divergence(policy_logprobs: torch.Tensor, reference_logprobs: torch.Tensor) -> torch.Tensor:
    """Low-variance estimate of KL(policy || reference) from the policy's own samples, per token.

    With d = reference - policy it is exp(d) - d - 1: never negative, 0 where they agree. As
    upstream, d is cut at 20 on both sides and the result at 10; beyond a cut there is no gradient.

    Args:
        policy_logprobs: any shape, float32 nats.
        reference_logprobs: the same shape.
    """
    gap = (reference_logprobs - policy_logprobs).clamp(-RATIO_LOG_BOUND, RATIO_LOG_BOUND)
    return (torch.expm1(gap) - gap).clamp(max=10.0)


def sft_loss(policy_logprobs: torch.Tensor, loss_mask: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood summed over target tokens.

    Args:
        policy_logprobs: [1, T] float32 nats.
        loss_mask: [1, T] float32, 1 at target tokens.
    """
    return -torch.where(loss_mask.bool(), policy_logprobs, 0.0).sum()
