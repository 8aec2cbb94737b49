"""From losses of tokens to the loss of an update: what a token weighs, and the denominator.

In: the mask of a packed row and its borders. Out: weights per token and this row's part of the
denominator, which is summed over all micro-batches and data-parallel ranks of an update, as the
weighted losses are (trainer/step.py); each sequence lies whole in one row. With N sequences of
|y_i| target tokens that have any, and l_it a token's loss:

    token_mean     sum_i sum_t l_it / sum_i |y_i|      DAPO, arXiv 2503.14476, equation 8
    sequence_mean  1/N sum_i 1/|y_i| sum_t l_it        GRPO, arXiv 2402.03300, equation 3
    dr_grpo        1/N sum_i 1/L sum_t l_it            Dr. GRPO, arXiv 2503.20783, section 3.2
    gspo           as sequence_mean, with a ratio per sequence: GSPO, arXiv 2507.18071, equation 5,
                   in the form with advantages per token (GSPO-token)
"""

from __future__ import annotations

import torch

from megatron_sr1.algorithm.sequences import at_tokens, sequence_sums, target_counts


def reduction(
    kind: str, loss_mask: torch.Tensor, cu_seqlens: torch.Tensor, max_response_tokens: int
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Weights of tokens and the denominator of a loss kind.

    Args:
        kind: token_mean | sequence_mean | dr_grpo | gspo.
        loss_mask: [1, T] float32, 1 at target tokens.
        cu_seqlens: [sequences + 1] int32, borders on the row.
        max_response_tokens: L of dr_grpo, the longest response that may be sampled.

    Returns:
        weights [1, T] float32, or None where each is 1; and this row's part of the denominator, a
        scalar: target tokens for token_mean, else sequences that have some.
    """
    if kind == "token_mean":
        return None, loss_mask.sum()
    counts = target_counts(loss_mask, cu_seqlens)
    num_sequences = (counts > 0).sum()
    if kind == "dr_grpo":
        return loss_mask / max_response_tokens, num_sequences
    assert kind in ("sequence_mean", "gspo"), kind
    return loss_mask / at_tokens(counts.clamp(min=1), cu_seqlens), num_sequences


def sequence_log_ratios(
    policy_logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    loss_mask: torch.Tensor,
    cu_seqlens: torch.Tensor,
) -> torch.Tensor:
    """GSPO's ratio at every token: its value is the sequence's, its gradient the token's.

    s_it = sg[s_i] pi_t / sg[pi_t] with s_i = (pi(y_i) / pi_old(y_i))^(1 / |y_i|), sg without
    gradient. Where all tokens of a sequence have one advantage, value and gradient of the loss are
    those of the ratio s_i; where credit goes by span, each token has its own advantage.

    Args:
        policy_logprobs: [1, T] float32 nats, with gradients.
        old_logprobs: [1, T] float32 nats, of the weights that the batch is on-policy for.
        loss_mask: [1, T] float32, 1 at target tokens.
        cu_seqlens: [sequences + 1] int32, borders on the row.

    Returns:
        log s_it [1, T] float32 nats, with gradients; meaningless outside the targets.
    """
    policy = policy_logprobs.detach()
    counts = target_counts(loss_mask, cu_seqlens).clamp(min=1)
    means = sequence_sums(policy - old_logprobs, loss_mask, cu_seqlens) / counts
    return at_tokens(means, cu_seqlens) + (policy_logprobs - policy)
