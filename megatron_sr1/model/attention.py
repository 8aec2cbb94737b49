"""Core attention over a packed row with torch's SDPA: every sequence attends to itself.

Sequences of similar length are batched into one SDPA call: causal ones are padded at the end, where
no earlier token attends to them; others are batched only with sequences of exactly their length. So
no mask is built, except where a row is split over context-parallel ranks: the queries of a chunk
attend to more keys than the chunk has, which SDPA's causal flag cannot express.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_sr1.model.row_split import RowSplit, Segment

# A causal sequence is padded to the longest of a batch if it fills this share of it, or lacks at
# most this many tokens: padding short sequences is cheaper than another kernel launch.
MIN_FILL = 0.75
FREE_PADDING_TOKENS = 16


@dataclass(frozen=True)
class SequenceBatch:
    """Sequences, or chunks of them, of one SDPA call.

    Attributes:
        num_queries: slots of each sequence.
        key_rows: [num_sequences * keys] int64, the row of each key; None: the queries' slots.
        mask: [num_sequences, 1, queries, keys] bool, True where a query attends to a key; None:
            given by `AttentionPlan.is_causal`, with as many queries as keys.
    """

    num_sequences: int
    num_queries: int
    key_rows: torch.Tensor | None = None
    mask: torch.Tensor | None = None


@dataclass(frozen=True)
class AttentionPlan:
    """How a packed row of `num_tokens` tokens of this rank is divided into batches.

    The last three are positions in the concatenated batches; None: tokens in order, no padding.

    Attributes:
        rows: [slots] int64, the token in each slot; a padding slot repeats its sequence's first.
        places: [num_tokens] int64, each token's slot.
        padding: [padding slots] int64.
    """

    batches: tuple[SequenceBatch, ...]
    num_tokens: int
    is_causal: bool
    rows: torch.Tensor | None = None
    places: torch.Tensor | None = None
    padding: torch.Tensor | None = None


@dataclass
class PackedRow(PackedSeqParams):
    """Megatron's packing parameters plus a plan; the layout remains sbhd.

    The boundaries are those of the whole row; `plan` and `split` are of this rank's share.
    """

    plan: AttentionPlan | None = None
    split: RowSplit | None = None


def plan_attention(split: RowSplit, *, is_causal: bool) -> AttentionPlan:
    """Divide this rank's share of a row into batches of sequences of similar length."""
    segments, places, device = split.segments, split.places, split.cu_seqlens.device
    total = sum(segment.num_queries for segment in segments)
    if places is None and len({segment.num_keys for segment in segments}) == 1:
        batch = SequenceBatch(len(segments), segments[0].num_queries)
        return AttentionPlan((batch,), total, is_causal)
    batches, all_rows, are_tokens = [], [], []
    for members in _group_by_length(segments, is_causal):
        counts = [segment.num_queries for segment in members]
        rows, is_token = _slots([segment.first_query for segment in members], counts)
        all_rows.append(rows.flatten())
        are_tokens.append(is_token.flatten())
        if places is None:
            batches.append(SequenceBatch(len(members), max(counts)))
            continue
        num_keys = [segment.num_keys for segment in members]
        keys, _ = _slots([segment.first_key for segment in members], num_keys)
        seen = torch.tensor(num_keys)[:, None] - torch.tensor(counts)[:, None]
        seen = seen + torch.arange(rows.shape[1])  # the last key that each query sees
        mask = torch.arange(keys.shape[1]) <= seen[:, None, :, None]
        key_rows = places[keys.flatten().to(device)]
        batches.append(SequenceBatch(len(members), max(counts), key_rows, mask.to(device)))
    rows, is_token = torch.cat(all_rows), torch.cat(are_tokens)
    token_slots = is_token.nonzero()[:, 0]
    token_places = torch.empty(total, dtype=torch.int64)
    token_places[rows[token_slots]] = token_slots
    found = (rows, token_places, (~is_token).nonzero()[:, 0])
    return AttentionPlan(tuple(batches), total, is_causal, *(t.to(device) for t in found))


def pack_row(split: RowSplit, *, is_causal: bool) -> PackedRow:
    """Return the packing parameters of a row for Megatron's attention layers."""
    longest = int(split.cu_seqlens.diff().max())
    # Transformer Engine's context parallelism splits sequences at the padded boundaries.
    padded = None if split.places is None else split.cu_seqlens
    return PackedRow(
        qkv_format="sbhd",
        cu_seqlens_q=split.cu_seqlens,
        cu_seqlens_kv=split.cu_seqlens,
        cu_seqlens_q_padded=padded,
        cu_seqlens_kv_padded=padded,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        plan=plan_attention(split, is_causal=is_causal),
        split=split,
    )


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: AttentionPlan
) -> torch.Tensor:
    """Compute attention within each sequence of a packed row, for which `plan` was made.

    The query is [T, heads, width], key and value are [tokens of the whole row, key/value heads,
    width]; the result is [T, heads * width]. Scores are scaled by 1 / sqrt(width).
    """
    assert query.shape[0] == plan.num_tokens, (
        f"cu_seqlens end at {plan.num_tokens}, the row has {query.shape[0]} tokens"
    )
    queries = _batches_of(query, plan)
    keys, values = (_batches_of(tensor, plan, are_keys=True) for tensor in (key, value))
    results = []
    for batch, *parts in zip(plan.batches, queries, keys, values, strict=True):
        q, k, v = (t.unflatten(0, (batch.num_sequences, -1)).transpose(1, 2) for t in parts)
        context = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=batch.mask,
            is_causal=plan.is_causal and batch.mask is None,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        results.append(context.transpose(1, 2).flatten(0, 1).flatten(1))
    joined = results[0] if len(results) == 1 else torch.cat(results)
    if plan.rows is None:
        return joined
    return _Gather.apply(joined, plan.places, plan.rows, plan.padding)


def _batches_of(
    tensor: torch.Tensor, plan: AttentionPlan, *, are_keys: bool = False
) -> Sequence[torch.Tensor]:
    """Split queries, or keys or values, into one [slots, heads, width] tensor per batch."""
    places = [batch.key_rows for batch in plan.batches if batch.key_rows is not None]
    if are_keys and places:  # chunks of a sequence share keys
        return [tensor.index_select(0, rows) for rows in places]
    if plan.rows is not None:
        tensor = _Gather.apply(tensor, plan.rows, plan.places)
    return tensor.split([batch.num_sequences * batch.num_queries for batch in plan.batches])


class _Gather(torch.autograd.Function):
    """Select rows of a tensor, each once, so that gradients are gathered back, not added up.

    Padding repeats a row. Nothing attends to padding, so its gradient is 0 and is not added; rows
    in `left_out` are padding, too, and get the gradient 0.
    """

    @staticmethod
    def forward(
        ctx: Any,
        tensor: torch.Tensor,
        there: torch.Tensor,
        back: torch.Tensor,
        left_out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        ctx.back, ctx.left_out = back, left_out
        return tensor.index_select(0, there)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        found = gradient.index_select(0, ctx.back)
        if ctx.left_out is not None:
            found.index_fill_(0, ctx.left_out, 0)
        return found, None, None, None


class PackedAttention(MegatronModule):
    """Core attention of Megatron's layers for packed rows, used for text and vision."""

    def __init__(self, config: TransformerConfig, **unused: Any) -> None:
        """Accept the arguments that Megatron's `Attention` passes to any core attention."""
        super().__init__(config=config)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: None,
        packed_seq_params: PackedRow,
        **unused: Any,
    ) -> torch.Tensor:
        """Attend within each sequence of the row, which `packed_seq_params` describes.

        The query is [T, 1, heads, width], with this rank's heads, key and value are [T, 1,
        key/value heads, width]; the result is [T, 1, heads * width].
        """
        assert query.shape[1] == 1, "a packed row has batch size 1"
        plan, split = packed_seq_params.plan, packed_seq_params.split
        assert plan is not None and split is not None
        key, value = split.gather(key[:, 0]), split.gather(value[:, 0])
        return attend(query[:, 0], key, value, plan).unsqueeze(1)


def _slots(starts: Sequence[int], counts: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each slot's row, [sequences, longest], and whether it holds a token, not padding."""
    place = torch.arange(max(counts))
    is_token = place < torch.tensor(counts)[:, None]
    return torch.tensor(starts)[:, None] + torch.where(is_token, place, 0), is_token


def _group_by_length(segments: Sequence[Segment], is_causal: bool) -> list[list[Segment]]:
    """Group the segments by similar length, the longest first."""

    def are_similar(one: int, other: int) -> bool:
        free = max(FREE_PADDING_TOKENS, (1 - MIN_FILL) * max(one, other)) if is_causal else 0
        return abs(one - other) <= free

    groups: list[list[Segment]] = []
    for segment in sorted(segments, key=lambda s: (-s.num_keys, -s.num_queries)):
        for group in groups:
            queries, keys = group[0].num_queries, group[0].num_keys
            if are_similar(queries, segment.num_queries) and are_similar(keys, segment.num_keys):
                group.append(segment)
                break
        else:
            groups.append([segment])
    return groups
