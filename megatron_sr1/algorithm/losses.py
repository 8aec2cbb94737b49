"""Losses over packed tokens, and how they are reduced to the loss of an update.

Logprobs, advantages and masks are [1, T] float32, logprobs in nats; a mask is 1 at target tokens;
`cu_seqlens` is [sequences + 1] int32, the boundaries on the row. A loss is a sum over target
tokens. Sums and denominators are added over all micro-batches and data-parallel ranks of an update,
then divided (trainer/step.py). A sequence is never split over rows, so nothing here communicates.

Sources of the policy loss: PPO's clipped ratio (arXiv 1707.06347, equation 7), the dual clip (arXiv
1912.09729, equation 5), the k3 estimator (Schulman, "Approximating KL divergence", 2020), as
Vision-SR1 combines them (arXiv 2508.19652). Its reduction, where l_it is the loss of token t of
sequence i, and N counts the sequences with |y_i| > 0 target tokens:

    token_mean     sum_i sum_t l_it / sum_i |y_i|      DAPO, arXiv 2503.14476, equation 8
    sequence_mean  1/N sum_i 1/|y_i| sum_t l_it        GRPO, arXiv 2402.03300, equation 3
    dr_grpo        1/N sum_i 1/L sum_t l_it            Dr. GRPO, arXiv 2503.20783, section 3.2
    gspo           as sequence_mean, with a ratio per sequence: GSPO, arXiv 2507.18071, equation 5,
                   in the form with advantages per token (GSPO-token)
"""

from __future__ import annotations

import torch

from megatron_sr1.config.training import AlgorithmConfig
from megatron_sr1.records import PackedBatch

RATIO_LOG_BOUND = 20.0
"""|log ratio| is clamped to this before exp, far outside any clip, to stay finite in float32."""


def policy_loss(
    policy_logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    batch: PackedBatch,
    algorithm: AlgorithmConfig,
    max_response_tokens: int,
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Return the clipped policy loss plus KL to the reference, summed over target tokens.

    Other tokens are ignored, whatever they hold.

    Args:
        policy_logprobs: of the labels, with gradients.
        old_logprobs: of the weights for which the batch is on-policy.
        batch: mask, advantages and, unless `kl_coefficient` is 0, the reference's logprobs.
        algorithm: reduction, clips and weight of the KL term.
        max_response_tokens: L of dr_grpo, the longest response that may be sampled.

    Returns:
        the sum, a scalar; this row's part of the denominator, a scalar; and unweighted sums over
        target tokens: `clipped_share`, `dual_clipped_share`, `old_kl` (k1, KL(old || policy)),
        `entropy` (-log pi of the sampled tokens, whose mean estimates it) and, with a reference,
        `reference_kl` (k3); and the maximum `ratio_max`.
    """
    assert batch.advantages is not None
    mask, cu_seqlens = batch.loss_mask, batch.cu_seqlens
    weights, denominator = _reduction(algorithm.loss, mask, cu_seqlens, max_response_tokens)
    targets = mask.bool()
    policy, old, advantage = (t[targets] for t in (policy_logprobs, old_logprobs, batch.advantages))
    # From here on everything has shape [targets].
    log_ratio, low, high = policy - old, algorithm.clip_low, algorithm.clip_high
    if algorithm.loss == "gspo":
        by_sequence = _sequence_log_ratios(policy_logprobs, old_logprobs, mask, cu_seqlens)
        log_ratio = by_sequence[targets]
        low, high = algorithm.gspo_clip_low, algorithm.gspo_clip_high
    ratio = log_ratio.clamp(-RATIO_LOG_BOUND, RATIO_LOG_BOUND).exp()
    plain = -advantage * ratio
    clipped = -advantage * ratio.clamp(1 - low, 1 + high)
    worse = torch.maximum(plain, clipped)
    bounded = torch.minimum(worse, -advantage * algorithm.dual_clip)
    negative = advantage < 0
    loss = torch.where(negative, bounded, worse)
    reported = {
        "clipped_share": (clipped > plain).sum(),
        "dual_clipped_share": (negative & (bounded < worse)).sum(),
        "old_kl": (old - policy).sum(),
        "entropy": -policy.sum(),
        "ratio_max": ratio.max() if ratio.numel() else ratio.new_zeros(()),
    }
    if batch.reference_logprobs is not None:
        divergence = k3_divergence(policy, batch.reference_logprobs[targets])
        loss = loss + algorithm.kl_coefficient * divergence
        reported["reference_kl"] = divergence.sum()
    if weights is not None:
        loss = loss * weights[targets]
    return loss.sum(), denominator, {name: value.detach() for name, value in reported.items()}


def k3_divergence(policy_logprobs: torch.Tensor, reference_logprobs: torch.Tensor) -> torch.Tensor:
    """Estimate KL(policy || reference) per token, with low variance, from the policy's samples.

    The estimate is exp(d) - d - 1 with d = reference - policy: 0 where they agree, else positive.
    As upstream, d is clamped to [-20, 20] and the result to 10; clamped values have no gradient.
    """
    gap = (reference_logprobs - policy_logprobs).clamp(-RATIO_LOG_BOUND, RATIO_LOG_BOUND)
    return (torch.expm1(gap) - gap).clamp(max=10.0)


def sft_loss(policy_logprobs: torch.Tensor, loss_mask: torch.Tensor) -> torch.Tensor:
    """Return the negative log-likelihood summed over target tokens."""
    return -torch.where(loss_mask.bool(), policy_logprobs, 0.0).sum()


def _reduction(
    kind: str, loss_mask: torch.Tensor, cu_seqlens: torch.Tensor, max_response_tokens: int
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Return token weights [1, T], None if all are 1, and this row's part of the denominator.

    The denominator counts target tokens for token_mean, else sequences with target tokens.
    """
    if kind == "token_mean":
        return None, loss_mask.sum()
    counts = target_counts(loss_mask, cu_seqlens)
    num_sequences = (counts > 0).sum()
    if kind == "dr_grpo":
        return loss_mask / max_response_tokens, num_sequences
    assert kind in ("sequence_mean", "gspo"), kind
    return loss_mask / expand_to_tokens(counts.clamp(min=1), cu_seqlens), num_sequences


def _sequence_log_ratios(
    policy_logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    loss_mask: torch.Tensor,
    cu_seqlens: torch.Tensor,
) -> torch.Tensor:
    """Return GSPO's log ratio per token: the sequence's value with the token's gradient.

    s_it = sg[s_i] pi_t / sg[pi_t], where s_i = (pi(y_i) / pi_old(y_i))^(1 / |y_i|) and sg stops the
    gradient. If all tokens of a sequence share an advantage, value and gradient of the loss are
    those with the ratio s_i; with credit per span, each token keeps its own advantage. The result
    is undefined outside the targets.
    """
    policy = policy_logprobs.detach()
    counts = target_counts(loss_mask, cu_seqlens).clamp(min=1)
    means = sequence_sums(policy - old_logprobs, loss_mask, cu_seqlens) / counts
    return expand_to_tokens(means, cu_seqlens) + (policy_logprobs - policy)


def sequence_sums(
    values: torch.Tensor, loss_mask: torch.Tensor, cu_seqlens: torch.Tensor
) -> torch.Tensor:
    """Return the sum over each sequence's target tokens, [sequences] float32, with gradients.

    It is 0 for sequences without targets, such as padding.
    """
    chosen = torch.where(loss_mask.bool(), values, 0.0)[0]
    # One thread adds up a sequence, so unlike scatter_add the result is deterministic.
    return torch.segment_reduce(chosen, "sum", lengths=cu_seqlens.diff().long(), initial=0.0)


def target_counts(loss_mask: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """Return the number of target tokens of each sequence, [sequences] float32."""
    return sequence_sums(torch.ones_like(loss_mask), loss_mask, cu_seqlens)


def expand_to_tokens(per_sequence: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """Give every token, [1, T], the value of its sequence, [sequences]."""
    return per_sequence.repeat_interleave(cu_seqlens.diff().long())[None]
