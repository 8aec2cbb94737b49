"""Sums over the sequences of a packed row, and numbers of sequences back to their tokens.

In: numbers per token [1, T] and the borders of the row's sequences. Each sequence lies whole in one
row, so nothing is summed over ranks here.
"""

from __future__ import annotations

import torch


def sequence_sums(
    values: torch.Tensor, loss_mask: torch.Tensor, cu_seqlens: torch.Tensor
) -> torch.Tensor:
    """Sum over each sequence's target tokens.

    Args:
        values: [1, T] float32; what stands outside the targets is not looked at.
        loss_mask: [1, T] float32, 1 at target tokens.
        cu_seqlens: [sequences + 1] int32, borders on the row.

    Returns:
        [sequences] float32, with gradients; 0 for a sequence without targets, as padding is.
    """
    chosen = torch.where(loss_mask.bool(), values, 0.0)[0]
    # One thread a sequence adds it up: unlike scattered additions the same bits each time.
    return torch.segment_reduce(chosen, "sum", lengths=cu_seqlens.diff().long(), initial=0.0)


def target_counts(loss_mask: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """Target tokens of each sequence, [sequences] float32."""
    return sequence_sums(torch.ones_like(loss_mask), loss_mask, cu_seqlens)


def at_tokens(per_sequence: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """Each token's sequence's number.

    Args:
        per_sequence: [sequences].
        cu_seqlens: [sequences + 1] int32, borders on the row.

    Returns:
        [1, T] of the same type.
    """
    return per_sequence.repeat_interleave(cu_seqlens.diff().long())[None]
