"""What a conversion would move, before any of it is read: by headers or by the configuration alone.

In: a model's units and the types on both sides. Out: a row a unit, and sums: bytes, files, and the
anonymous memory that the conversion will need at its peak. How a unit is held on the way is what
to_megatron.py and to_hf.py do; a test compares the prediction with what a conversion took.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_sr1.checkpoint.disk import size_text
from megatron_sr1.checkpoint.folders import INDEX, SINGLE, ModelSource
from megatron_sr1.checkpoint.hf_files import HEADER_SUFFIX
from megatron_sr1.conversion.published import Published
from megatron_sr1.conversion.reader import UnitReader
from megatron_sr1.conversion.to_megatron import source_dtype
from megatron_sr1.conversion.units import Unit, units
from megatron_sr1.conversion.writer import FILE_BYTES, split_units
from megatron_sr1.errors import CheckpointError
from megatron_sr1.model.hf_config import read_hf_config

# Python, torch and its checkpoint readers once they are imported; 220 MiB were measured.
BASE_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Move:
    """A unit on its way.

    Attributes:
        unit: which.
        source: type where it comes from.
        target: type where it goes.
        to_published: whether it goes to published weights.
        num_pieces: that the source has it in.
    """

    unit: Unit
    source: torch.dtype
    target: torch.dtype
    to_published: bool
    num_pieces: int = 1

    @property
    def target_bytes(self) -> int:
        """What is written of it."""
        return self.unit.num_values * self.target.itemsize

    @property
    def held_bytes(self) -> int:
        """Anonymous memory that it takes; pages of files are not counted."""
        source_bytes = self.unit.num_values * self.source.itemsize
        rounded = self.target_bytes if self.source != self.target else 0
        is_joined = self.unit.entry.form == "grouped"
        if not self.to_published:  # the published tensors are pages of their file
            return (source_bytes if is_joined else 0) + rounded
        # The whole beside a piece of it, or beside what it is split into and put together of.
        beside = (2 if self.unit.entry.num_parts > 1 else 1) * source_bytes if is_joined else 0
        pieces = source_bytes if self.num_pieces > 1 else 0
        return source_bytes + max(pieces, beside + rounded)


def plan_to_megatron(directory: Path, dtype: torch.dtype | None) -> list[Move]:
    """What `hf_to_megatron` would move, by the weight files' headers, or by config.json alone.

    Args:
        directory: of the model; headers and weights may be missing.
        dtype: to store; None keeps the source's.
    """
    if any((directory / name).is_file() for name in (INDEX, SINGLE, SINGLE + HEADER_SUFFIX)):
        published = Published.open(directory)
        tensors, parts = published.source.tensors, published.units
        dtype = dtype or source_dtype(published.source)
        return [Move(u, tensors[u.entry.hf_names[0]].dtype, dtype, False) for u in parts]
    config = read_hf_config(directory)
    named = config.raw.get("dtype") or config.raw.get("torch_dtype")
    source = getattr(torch, str(named), None)
    if not isinstance(source, torch.dtype):
        raise CheckpointError(f"{directory}/config.json: dtype {named!r} is no type of torch")
    return [Move(unit, source, dtype or source, False) for unit in units(config)]


def plan_to_hf(found: ModelSource) -> list[Move]:
    """What `megatron_to_hf` would move, by the metadata of a checkpoint."""
    published = Published.open(found.hf_files)
    tensors, parts = published.source.tensors, published.units
    reader = UnitReader(found.weights, parts)
    types = [tensors[unit.entry.hf_names[0]].dtype for unit in parts]
    return [
        Move(unit, reader.dtype(unit), dtype, True, reader.num_pieces(unit))
        for unit, dtype in zip(parts, types, strict=True)
    ]


def peak_bytes(planned: Sequence[Move]) -> int:
    """Anonymous memory of the whole conversion at its peak."""
    return BASE_BYTES + max(move.held_bytes for move in planned)


def largest(planned: Sequence[Move]) -> Move:
    """The move of the most bytes."""
    return max(planned, key=lambda move: move.unit.num_values * move.source.itemsize)


def rows(planned: Sequence[Move]) -> Iterator[str]:
    """A line a unit, then the sums."""
    for move in planned:
        unit = move.unit
        yield (
            f"{size_text(move.target_bytes):>12}  {list(unit.sizes)} at {list(unit.offsets)} of "
            f"{unit.key}  {', '.join(unit.entry.hf_names)}"
        )
    total = sum(move.target_bytes for move in planned)
    big = largest(planned)
    big_bytes = big.unit.num_values * big.source.itemsize
    names = ", ".join(big.unit.entry.hf_names)
    if not planned[0].to_published:
        files = split_units([move.unit for move in planned], big.target, FILE_BYTES)
        yield f"files            {len(files)} of at most {size_text(FILE_BYTES)} or one tensor"
    yield f"tensors          {sum(len(move.unit.entry.hf_names) for move in planned)}"
    yield f"bytes to write   {total} ({size_text(total)})"
    yield f"largest tensor   {big_bytes} ({size_text(big_bytes)}): {names}"
    yield (
        f"peak memory      {peak_bytes(planned)} ({size_text(peak_bytes(planned))}) predicted; "
        f"twice the largest and 1 GiB are {size_text(2 * big_bytes + 2**30)}"
    )
