"""Which tokens of a packed row a rank computes: its share of them, each shared one once.

Zigzag: each sequence is divided into 2 x ranks equal chunks, and rank r holds chunks r and
2 x ranks - 1 - r. So all ranks have equally many tokens and, under a causal mask, equally many
pairs of a query and a key. The order is that of Transformer Engine's context-parallel attention, so
that its kernels take the same rows.

Outside of the decoder every rank has the whole row: labels, masks and losses are not split. Each
rank backpropagates from the whole loss to its own tokens, so gradients are summed over
context-parallel ranks as over data-parallel ones, and tokens are counted on one of them.

Sequences that begin with the same tokens compute these once, on ranks that hold whole rows: in the
decoder the row lacks the others, and each sequence's queries attend to the keys of its whole. Their
hidden states and gradients are the same as if each sequence had computed its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

from megatron_sr1.errors import DataError
from megatron_sr1.runtime.groups import Group


@dataclass(frozen=True)
class Segment:
    """Consecutive queries of one rank, and the keys of their sequence up to the last query.

    The last query attends to all the keys, the one before it to all but one, and so on. Without a
    causal mask there are as many queries as keys, and all attend to all. `first_query` is a
    position among the rank's tokens, `first_key` one on the row.
    """

    first_query: int
    num_queries: int
    first_key: int
    num_keys: int


@dataclass(frozen=True)
class RowSplit:
    """One rank's share of a row of T tokens.

    Attributes:
        cu_seqlens: [sequences + 1] int32, boundaries of the whole row; the last is T.
        group: context-parallel ranks; None if this rank holds the whole row.
        segments: this rank's queries in order.
        own: [T / ranks] int64, position on the row of each token of this rank; None: all in order.
            Fewer if tokens are shared.
        places: [T] int64, position of each token of the row in the concatenated shares of the
            ranks; None: in order.
    """

    cu_seqlens: torch.Tensor
    group: Group | None
    segments: tuple[Segment, ...]
    own: torch.Tensor | None = None
    places: torch.Tensor | None = None

    def take(self, whole: torch.Tensor, dim: int) -> torch.Tensor:
        """Return this rank's share of a tensor with one entry per token along `dim`."""
        return whole if self.own is None else whole.index_select(dim, self.own)

    def gather(self, share: torch.Tensor) -> torch.Tensor:
        """Concatenate all ranks' shares [T / ranks, ...]; gradients are summed over the ranks.

        For tensors that each rank then uses in its own way: keys and values.
        """
        if self.group is None:
            return share
        return gather_from_sequence_parallel_region(share, group=self.group.process_group)

    def spread(self, share: torch.Tensor) -> torch.Tensor:
        """Repeat shared tokens of a share [own, ...] wherever the row has them."""
        if self.group is not None or self.places is None:
            return share
        return share.index_select(0, self.places)

    def take_spread(self, whole: torch.Tensor) -> torch.Tensor:
        """Return the entries of [1, T] values that belong to what `spread` returns."""
        return whole if self.group is None else self.take(whole, dim=1)

    def join(self, share: torch.Tensor) -> torch.Tensor:
        """Return the whole row [1, T, ...] of the ranks' shares [1, T / ranks, ...].

        For tensors that all ranks use in the same way: a share's gradient is a slice of the row's.
        """
        if self.group is None:
            return share
        whole = gather_from_sequence_parallel_region(
            share.transpose(0, 1).contiguous(),
            tensor_parallel_output_grad=False,
            group=self.group.process_group,
        )
        return whole.index_select(0, self.places).transpose(0, 1)


def sequence_multiple(num_ranks: int) -> int:
    """Return the number of tokens that each sequence's length must be a multiple of."""
    return 1 if num_ranks == 1 else 2 * num_ranks


def split_row(
    cu_seqlens: torch.Tensor, group: Group | None = None, shared_tokens: torch.Tensor | None = None
) -> RowSplit:
    """Split a row over the context-parallel ranks, if there are several.

    Without them, `shared_tokens`, [sequences], may say how many tokens at each sequence's start are
    those of the sequence before. Raises DataError if a sequence cannot be divided into equal
    chunks.
    """
    sequences = [(start, end - start) for start, end in pairwise(cu_seqlens.tolist())]
    if shared_tokens is not None and shared_tokens.any():
        assert group is None or group.size == 1, "context-parallel ranks do not share tokens"
        return _shared_row(cu_seqlens, sequences, shared_tokens.tolist())
    if group is None or group.size == 1:
        segments = [Segment(start, length, start, length) for start, length in sequences if length]
        return RowSplit(cu_seqlens, None, tuple(segments))
    multiple = sequence_multiple(group.size)
    segments, num_own = [], 0
    for start, length in sequences:
        if length % multiple:
            raise DataError(
                f"a sequence of {length} tokens cannot be split over {group.size} context-parallel "
                f"ranks; pad each sequence to a multiple of {multiple}"
            )
        size = length // multiple
        for chunk in (group.rank, multiple - 1 - group.rank) if size else ():
            segments.append(Segment(num_own, size, start, (chunk + 1) * size))
            num_own += size
    chunks = torch.cat([torch.arange(n) * multiple // max(n, 1) for _, n in sequences])
    order = torch.minimum(chunks, multiple - 1 - chunks).argsort(stable=True).to(cu_seqlens.device)
    own = order.unflatten(0, (group.size, -1))[group.rank]
    return RowSplit(cu_seqlens, group, tuple(segments), own, order.argsort())


def _shared_row(
    cu_seqlens: torch.Tensor, sequences: list[tuple[int, int]], shared: list[int]
) -> RowSplit:
    """Return a whole row in which each sequence's first tokens are those of the one before."""
    segments, own, places = [], list[torch.Tensor](), list[torch.Tensor]()
    num_own = 0
    for (start, length), num_shared in zip(sequences, shared, strict=True):
        new = length - num_shared
        segments.append(Segment(num_own, new, start, length))
        own.append(torch.arange(start + num_shared, start + length))
        before = places[-1][:num_shared] if num_shared else own[-1][:0]
        places.append(torch.cat([before, torch.arange(num_own, num_own + new)]))
        num_own += new
    found = (torch.cat(parts).to(cu_seqlens.device) for parts in (own, places))
    return RowSplit(cu_seqlens, None, tuple(s for s in segments if s.num_queries), *found)
