"""How a packed row is split over the context-parallel ranks: the one place that knows.

In: the borders of a row and the ranks. Out: a `RowSplit`, which takes this rank's share of
anything per token, gathers keys and values, and joins what the ranks computed.

Zigzag: each sequence is cut into 2 x ranks equal chunks, and rank r holds chunks r and
2 x ranks - 1 - r. So all ranks have as many tokens, and under a causal mask as many pairs of a
query and a key. Source of the order: Transformer Engine's context-parallel attention, so that its
kernels take the same rows.

Outside of the decoder every rank has the whole row: labels, masks and losses are not split. A rank
goes back from the whole loss to its own tokens, so gradients are summed over context-parallel ranks
as they are over data-parallel ones, and tokens are counted on one of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

from megatron_sr1.errors import DataError
from megatron_sr1.runtime.groups import Group


@dataclass(frozen=True)
class Segment:
    """Queries of one rank, one behind the other, and the keys of their sequence up to the last.

    The last query sees all the keys, the one before it all but one, and so on; without a causal
    mask there are as many queries as keys, and all see all.

    Attributes:
        first_query: place among the rank's tokens.
        num_queries: tokens.
        first_key: place on the row.
        num_keys: tokens, at least as many as queries.
    """

    first_query: int
    num_queries: int
    first_key: int
    num_keys: int


@dataclass(frozen=True)
class RowSplit:
    """One rank's share of a row of T tokens.

    Attributes:
        group: context-parallel ranks.
        segments: this rank's queries in order.
        own: [T / ranks] int64, place on the row of each token of this rank; None: all in order.
        places: [T] int64, where each token of the row lies in the ranks' shares, one behind the
            other; None: in order.
    """

    group: Group
    segments: tuple[Segment, ...]
    own: torch.Tensor | None = None
    places: torch.Tensor | None = None

    def take(self, whole: torch.Tensor, dim: int) -> torch.Tensor:
        """This rank's share of a tensor with one entry a token along `dim`."""
        return whole if self.own is None else whole.index_select(dim, self.own)

    def gather(self, share: torch.Tensor) -> torch.Tensor:
        """All ranks' shares [T / ranks, ...], one behind the other; gradients are summed back.

        For what every rank goes on with in its own way: keys and values.
        """
        if self.places is None:
            return share
        return gather_from_sequence_parallel_region(share, group=self.group.process_group)

    def join(self, share: torch.Tensor) -> torch.Tensor:
        """The whole row [1, T, ...] of the ranks' shares [1, T / ranks, ...].

        For what every rank goes on with in the same way: a share's gradient is its own part.
        """
        if self.places is None:
            return share
        whole = gather_from_sequence_parallel_region(
            share.transpose(0, 1).contiguous(),
            tensor_parallel_output_grad=False,
            group=self.group.process_group,
        )
        return whole.index_select(0, self.places).transpose(0, 1)


def sequence_multiple(num_ranks: int) -> int:
    """What each sequence's length must be a multiple of, tokens.

    Args:
        num_ranks: context-parallel ranks.
    """
    return 1 if num_ranks == 1 else 2 * num_ranks


def whole_sequences(lengths: Sequence[int]) -> tuple[Segment, ...]:
    """Sequences that one rank holds as they are; empty ones are left out."""
    segments, start = [], 0
    for length in lengths:
        if length:
            segments.append(Segment(start, length, start, length))
        start += length
    return tuple(segments)


def split_row(cu_seqlens: torch.Tensor, group: Group) -> RowSplit:
    """Split a row over the context-parallel ranks.

    Args:
        cu_seqlens: [sequences + 1] int32, borders on the row.
        group: context-parallel ranks.

    Raises:
        DataError: a sequence that cannot be cut into equal chunks.
    """
    borders, multiple = cu_seqlens.tolist(), sequence_multiple(group.size)
    lengths = [end - start for start, end in pairwise(borders)]
    if group.size == 1:
        return RowSplit(group, whole_sequences(lengths))
    for length in lengths:
        if length % multiple:
            raise DataError(
                f"a sequence of {length} tokens cannot be split over {group.size} context-parallel "
                f"ranks; pad each sequence to a multiple of {multiple}"
            )
    chunks = [list(_chunks(borders, rank, group.size)) for rank in range(group.size)]
    segments, num_own = [], 0
    for start, first, size in chunks[group.rank]:
        if size:
            segments.append(Segment(num_own, size, start, first + size - start))
            num_own += size
    shares = [torch.cat([torch.arange(a, a + size) for _, a, size in own]) for own in chunks]
    places = torch.empty(borders[-1], dtype=torch.int64)
    places[torch.cat(shares)] = torch.arange(borders[-1])
    device = cu_seqlens.device
    return RowSplit(group, tuple(segments), shares[group.rank].to(device), places.to(device))


def _chunks(borders: Sequence[int], rank: int, num_ranks: int) -> Iterator[tuple[int, int, int]]:
    """Yield each chunk of a rank: where its sequence starts, where it starts, its tokens."""
    for start, end in pairwise(borders):
        size = (end - start) // (2 * num_ranks)
        for number in (rank, 2 * num_ranks - 1 - rank):
            yield start, start + number * size, size
