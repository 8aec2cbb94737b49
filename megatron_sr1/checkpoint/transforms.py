"""Parameters from published tensors and back: pure, and nothing is lost.

Splitting over ranks is always done on the published tensors, part by part, and a rank joins its
own parts: so its q, k and v rows are grouped by key/value head, and its gate rows stand before
its up rows, as Megatron's layers expect (megatron/core/transformer/attention.py and mlp.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_sr1.checkpoint.mapping import ROW, WHOLE, Entry
from megatron_sr1.errors import ConfigError


@dataclass(frozen=True)
class Slice:
    """A block of a published tensor: what one rank reads for one part.

    Attributes:
        hf_name: of the tensor.
        rows: first and last+1 index along dimension 0; None for all.
        columns: the same along dimension 1.
    """

    hf_name: str
    rows: tuple[int, int] | None = None
    columns: tuple[int, int] | None = None


def slices(entry: Entry, rank: int, size: int, local_rows: int) -> list[Slice]:
    """What a tensor-parallel rank reads of the published tensors, in the order of `join`.

    Args:
        entry: of the parameter.
        rank: of the tensor-parallel group.
        size: ranks in it.
        local_rows: rows of the rank's parameter; they tell how far a vocabulary is padded.

    Raises:
        ConfigError: the dimension does not divide over the ranks.
    """
    found = []
    for name, shape in zip(entry.hf_names, entry.hf_shapes, strict=True):
        rows = shape[0] // entry.num_parts
        for part in range(entry.num_parts):
            first = part * rows
            if entry.shard_dim is WHOLE:
                found.append(Slice(name))
            elif entry.form == "vocabulary":
                borders = (min(rank * local_rows, rows), min((rank + 1) * local_rows, rows))
                found.append(Slice(name, borders))
            elif entry.shard_dim == ROW:
                share = _share(entry, shape[1], size)
                found.append(Slice(name, columns=(rank * share, (rank + 1) * share)))
            else:
                share = _share(entry, rows, size)
                found.append(Slice(name, (first + rank * share, first + (rank + 1) * share)))
    return found


def _share(entry: Entry, length: int, size: int) -> int:
    units = entry.num_groups if entry.form == "grouped" else length
    if units % size:
        what = "key/value heads" if entry.form == "grouped" else "rows or columns"
        raise ConfigError(
            f"{entry.name}: {units} {what} do not divide over parallel.tensor={size} ranks; use a "
            f"divisor of {units}"
        )
    return length // size


def join(entry: Entry, parts: Sequence[torch.Tensor], size: int = 1) -> torch.Tensor:
    """A rank's parameter from its parts.

    Args:
        entry: of the parameter.
        parts: as `slices` names them.
        size: tensor-parallel ranks.

    Returns:
        the parameter, vocabulary rows not padded.
    """
    if entry.form == "stacked":
        return torch.cat(list(parts))
    if entry.form == "flat":
        return parts[0].flatten(1)
    if entry.form == "grouped":
        groups = entry.num_groups // size
        return torch.cat([p.unflatten(0, (groups, -1)) for p in parts], dim=1).flatten(0, 1)
    return parts[0]


def assemble(entry: Entry, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """A whole parameter from its published tensors."""
    return join(entry, [part for t in tensors for part in t.chunk(entry.num_parts)])


def disassemble(entry: Entry, parameter: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """The published tensors of a whole parameter, views of it where that can be."""
    return _named(entry, split(entry, parameter))


def split(entry: Entry, parameter: torch.Tensor, size: int = 1) -> list[torch.Tensor]:
    """The parts of a rank's parameter; undoes `join`."""
    if entry.form == "stacked":
        return list(parameter.chunk(len(entry.hf_names)))
    if entry.form == "flat":
        return [parameter.unflatten(1, entry.hf_shapes[0][1:])]
    if entry.form == "grouped":
        shapes = [s[0] // entry.num_parts for s in entry.hf_shapes for _ in range(entry.num_parts)]
        by_group = parameter.unflatten(0, (entry.num_groups // size, -1))
        pieces = by_group.split([rows // entry.num_groups for rows in shapes], dim=1)
        return [piece.flatten(0, 1) for piece in pieces]
    return [parameter]


def publish(entry: Entry, shards: Sequence[torch.Tensor]) -> list[tuple[str, torch.Tensor]]:
    """The published tensors of a parameter.

    Args:
        entry: of the parameter.
        shards: of all tensor-parallel ranks in order, each as `join` makes it; one is enough where
            every rank has it all. Vocabulary rows may be padded.

    Returns:
        (published name, whole tensor) in the entry's order; of a single shard, views where that
        can be.
    """
    if entry.shard_dim is WHOLE:
        parts = split(entry, shards[0])
    else:
        by_rank = [split(entry, shard, len(shards)) for shard in shards]
        together = zip(*by_rank, strict=True)
        parts = [torch.cat(p, entry.shard_dim) if len(p) > 1 else p[0] for p in together]
    return _named(entry, parts)


def _named(entry: Entry, parts: Sequence[torch.Tensor]) -> list[tuple[str, torch.Tensor]]:
    n = entry.num_parts
    whole = [torch.cat(parts[i : i + n]) if n > 1 else parts[i] for i in range(0, len(parts), n)]
    if entry.form == "vocabulary":
        whole = [t[: shape[0]] for t, shape in zip(whole, entry.hf_shapes, strict=True)]
    return list(zip(entry.hf_names, whole, strict=True))
