"""Parameters from published tensors and back: pure functions that lose nothing.

The published tensors are split over ranks, part by part, and each rank joins its own parts: so its
q, k and v rows are grouped by key/value head, and its gate rows come before its up rows, as
Megatron's layers expect (megatron/core/transformer/attention.py and mlp.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_sr1.checkpoint.mapping import ROW, WHOLE, Entry
from megatron_sr1.errors import ConfigError

Block = tuple[str, tuple[slice, ...]]  # name of a published tensor and where; () for all of it


def slices(entry: Entry, rank: int, size: int, local_rows: int) -> list[Block]:
    """Return what a tensor-parallel rank reads of the published tensors, in the order of `join`.

    `local_rows` include a vocabulary's padding. Raises `ConfigError` if the dimension does not
    divide over the ranks.
    """
    found: list[Block] = []
    for name, shape in zip(entry.hf_names, entry.hf_shapes, strict=True):
        rows = shape[0] // entry.num_parts
        for first in range(0, shape[0], rows):
            if entry.shard_dim is WHOLE:
                found.append((name, ()))
            elif entry.form == "vocabulary":
                begin, end = (min(r * local_rows, rows) for r in (rank, rank + 1))
                found.append((name, (slice(begin, end),)))
            elif entry.shard_dim == ROW:
                share = _share(entry, shape[1], size)
                found.append((name, (slice(None), slice(rank * share, (rank + 1) * share))))
            else:
                share = _share(entry, rows, size)
                begin = first + rank * share
                found.append((name, (slice(begin, begin + share),)))
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
    """Join the parts that `slices` names to a rank's parameter, vocabulary rows not padded."""
    if entry.form == "stacked":
        return torch.cat(list(parts))
    if entry.form == "flat":
        return parts[0].flatten(1)
    if entry.form == "grouped":
        groups = entry.num_groups // size
        return torch.cat([p.unflatten(0, (groups, -1)) for p in parts], dim=1).flatten(0, 1)
    return parts[0]


def split(entry: Entry, parameter: torch.Tensor, size: int = 1) -> list[torch.Tensor]:
    """Return the parts of a rank's parameter; undoes `join`."""
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
    """Return (published name, whole tensor) of a parameter, in the entry's order.

    The shards are those of all tensor-parallel ranks in order, as `join` makes them, vocabulary
    rows padded; one is enough where every rank has all of it. Of one, the tensors may be views.
    """
    if entry.shard_dim is WHOLE:
        parts = split(entry, shards[0])
    else:
        by_rank = zip(*(split(entry, shard, len(shards)) for shard in shards), strict=True)
        parts = [torch.cat(p, entry.shard_dim) if len(p) > 1 else p[0] for p in by_rank]
    n = entry.num_parts
    whole = [torch.cat(parts[i : i + n]) if n > 1 else parts[i] for i in range(0, len(parts), n)]
    if entry.form == "vocabulary":
        whole = [t[: shape[0]] for t, shape in zip(whole, entry.hf_shapes, strict=True)]
    return list(zip(entry.hf_names, whole, strict=True))


def merged(
    weight: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor, scale: float
) -> torch.Tensor:
    """Return a published weight with its adapter: W + scale B A in float32, rounded once.

    W is [out, in], A [rank, in], B [out, rank]. In float32 the bits are those of PEFT's own merge
    (`get_delta_weight` of peft/tuners/lora/layer.py): the same product of the same shapes.
    """
    product = lora_b.to(weight.device, torch.float32) @ lora_a.to(weight.device, torch.float32)
    return (weight.float() + product.mul_(scale)).to(weight.dtype)
