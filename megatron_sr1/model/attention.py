"""Core attention over a packed row: every sequence attends to itself, on torch's SDPA.

In: query, key and value of a row of T tokens with sequences one behind the other, and a plan made
once a row from `cu_seqlens`. Out: the context of each token. Sequences of like length go through
SDPA together, as a batch: causal ones padded at their end, where no earlier token looks; others
only with sequences of exactly their length. So no mask is ever built.

The row keeps Megatron's [T, 1, heads, width] layout, so that the rotary embedding stays a table
with one row a token (exact for packed rows), and only this module knows about the packing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

# A causal sequence joins a longer one's batch if it fills this share of it, or lacks at most so
# many tokens: short ones are cheaper to pad than to start a kernel for.
MIN_FILL = 0.75
FREE_PADDING_TOKENS = 32


@dataclass(frozen=True)
class SequenceBatch:
    """Sequences that go through SDPA together.

    Attributes:
        num_sequences: in the batch.
        length: tokens of each, padding included.
        rows: [num_sequences * length] int64, the row of each slot; a padding slot repeats its
            sequence's first row. None: the slots are the whole row in order.
    """

    num_sequences: int
    length: int
    rows: torch.Tensor | None


@dataclass(frozen=True)
class AttentionPlan:
    """How a packed row is cut into batches.

    Attributes:
        batches: all sequences, each in one batch.
        slots: [T] int64, where each token's result lies in the batches' results, one behind the
            other; None: they are in order.
        num_tokens: T.
        is_causal: a token sees itself and what is before it, else its whole sequence.
    """

    batches: tuple[SequenceBatch, ...]
    slots: torch.Tensor | None
    num_tokens: int
    is_causal: bool


@dataclass
class PackedRow(PackedSeqParams):
    """Megatron's packing parameters with a plan; the layout stays sbhd, see above."""

    plan: AttentionPlan | None = None


def plan_attention(
    lengths: Sequence[int], *, is_causal: bool, device: torch.device | str = "cpu"
) -> AttentionPlan:
    """Cut a packed row into batches of sequences of like length.

    Args:
        lengths: of the sequences in order, tokens; zeros are left out.
        is_causal: whether padding at the end is harmless.
        device: of the index tensors.
    """
    starts, total, sequences = [], 0, [n for n in lengths if n > 0]
    for length in sequences:
        starts.append(total)
        total += length
    if len(set(sequences)) == 1:
        whole = SequenceBatch(len(sequences), sequences[0], None)
        return AttentionPlan((whole,), None, total, is_causal)
    groups = _group_by_length(sequences, is_causal)
    batches, slots, offset = [], torch.empty(total, dtype=torch.int64), 0
    for members in groups:
        longest = sequences[members[0]]
        first = torch.tensor([starts[i] for i in members])[:, None]
        count = torch.tensor([sequences[i] for i in members])[:, None]
        place = torch.arange(longest)[None, :]
        is_token = place < count
        rows = first + torch.where(is_token, place, 0)
        slots[rows[is_token]] = offset + torch.arange(rows.numel()).view_as(rows)[is_token]
        batches.append(SequenceBatch(len(members), longest, rows.flatten().to(device)))
        offset += rows.numel()
    return AttentionPlan(tuple(batches), slots.to(device), total, is_causal)


def pack_row(
    cu_seqlens: torch.Tensor, *, is_causal: bool, max_seqlen: int | None = None
) -> PackedRow:
    """Packing parameters of a row for Megatron's attention layers.

    Args:
        cu_seqlens: [sequences + 1] int32, borders on the row.
        is_causal: text is, vision is not.
        max_seqlen: longest sequence, tokens; counted if None.
    """
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).tolist()
    longest = max(lengths, default=0) if max_seqlen is None else max_seqlen
    return PackedRow(
        qkv_format="sbhd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        plan=plan_attention(lengths, is_causal=is_causal, device=cu_seqlens.device),
    )


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: AttentionPlan,
    softmax_scale: float | None = None,
) -> torch.Tensor:
    """Attention of a packed row.

    Args:
        query: [T, heads, width].
        key: [T, key/value heads, width].
        value: [T, key/value heads, width].
        plan: of the row.
        softmax_scale: of the scores; None is 1 / sqrt(width).

    Returns:
        [T, heads * width].
    """
    assert query.shape[0] == plan.num_tokens, (
        f"cu_seqlens end at {plan.num_tokens}, the row has {query.shape[0]} tokens"
    )
    results = []
    for batch in plan.batches:
        parts = []
        for tensor in (query, key, value):
            taken = tensor if batch.rows is None else tensor.index_select(0, batch.rows)
            cut = taken.view(batch.num_sequences, batch.length, *tensor.shape[1:])
            parts.append(cut.transpose(1, 2))
        context = F.scaled_dot_product_attention(
            parts[0],
            parts[1],
            parts[2],
            is_causal=plan.is_causal,
            scale=softmax_scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        results.append(context.transpose(1, 2).reshape(batch.num_sequences * batch.length, -1))
    joined = results[0] if len(results) == 1 else torch.cat(results)
    return joined if plan.slots is None else joined.index_select(0, plan.slots)


class PackedAttention(MegatronModule):
    """Megatron's core attention for packed rows, text and vision alike.

    It takes the place of `DotProductAttention` in a layer's spec. What a row looks like comes
    with each call, as a `PackedRow`.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        **unused: Any,
    ) -> None:
        """Take what Megatron's `Attention` hands to any core attention."""
        super().__init__(config=config)
        assert config.attention_dropout == 0.0, "attention dropout is not supported"
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedRow | None = None,
        **unused: Any,
    ) -> torch.Tensor:
        """Attend within each sequence of the row.

        Args:
            query: [T, 1, heads, width], heads of this rank.
            key: [T, 1, key/value heads, width].
            value: [T, 1, key/value heads, width].
            attention_mask: None; the row says who sees whom.
            attn_mask_type: of the layer, unused: the row knows.
            attention_bias: None.
            packed_seq_params: the row.
            unused: what newer releases add.

        Returns:
            [T, 1, heads * width].
        """
        assert packed_seq_params is not None and packed_seq_params.plan is not None
        assert query.shape[1] == 1, "a packed row has batch size 1"
        plan, scale = packed_seq_params.plan, self.softmax_scale
        return attend(query[:, 0], key[:, 0], value[:, 0], plan, scale).unsqueeze(1)


def _group_by_length(lengths: Sequence[int], is_causal: bool) -> list[list[int]]:
    """Numbers of the sequences of each batch, the longest first."""
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if groups:
            longest = lengths[groups[-1][0]]
            padding = longest - lengths[i]
            free = max(FREE_PADDING_TOKENS, (1 - MIN_FILL) * longest)
            if padding <= (free if is_causal else 0):
                groups[-1].append(i)
                continue
        groups.append([i])
    return groups
