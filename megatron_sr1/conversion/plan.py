"""What a conversion would move, before any of it is read: by headers or by the configuration alone.

The anonymous memory at the peak is predicted from how convert.py holds a unit; a test compares it
with what a conversion took.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_sr1.checkpoint.disk import size_text
from megatron_sr1.checkpoint.folders import INDEX, ModelSource
from megatron_sr1.conversion.units import Published, Unit, UnitReader, units
from megatron_sr1.conversion.writer import FILE_BYTES, split_units
from megatron_sr1.errors import CheckpointError
from megatron_sr1.model.hf_config import read_hf_config

# Python, torch and its checkpoint readers once they are imported; 220 MiB were measured.
BASE_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Move:
    """A unit, its types on both sides, and the number of pieces that the source has it in."""

    unit: Unit
    source: torch.dtype
    target: torch.dtype
    to_published: bool
    num_pieces: int = 1

    @property
    def source_bytes(self) -> int:
        """Size where it comes from."""
        return self.unit.num_values * self.source.itemsize

    @property
    def target_bytes(self) -> int:
        """Size of what is written."""
        return self.unit.num_values * self.target.itemsize

    @property
    def held_bytes(self) -> int:
        """Anonymous memory that it takes; pages of files are not counted."""
        rounded = self.target_bytes if self.source != self.target else 0
        is_joined = self.unit.entry.form == "grouped"
        if not self.to_published:  # the published tensors are pages of their file
            return (self.source_bytes if is_joined else 0) + rounded
        # The whole with a piece of it, or with its parts and what they are joined to.
        copies = 2 if self.unit.entry.num_parts > 1 else 1
        parts = copies * self.source_bytes if is_joined else 0
        pieces = self.source_bytes if self.num_pieces > 1 else 0
        return self.source_bytes + max(pieces, parts + rounded)


def plan_to_megatron(directory: Path, dtype: torch.dtype | None) -> list[Move]:
    """Plan `hf_to_megatron` from the weight files' headers, or from config.json alone."""
    if any(path.name != INDEX for path in directory.glob("*.safetensors*")):
        published = Published(directory)
        tensors, dtype = published.source.tensors, dtype or published.dtype
        return [
            Move(unit, tensors[unit.entry.hf_names[0]].dtype, dtype, False)
            for unit in published.units
        ]
    config = read_hf_config(directory)
    named = config.raw.get("dtype") or config.raw.get("torch_dtype")
    source = getattr(torch, str(named), None)
    if not isinstance(source, torch.dtype):
        raise CheckpointError(f"{directory}/config.json: dtype {named!r} is no type of torch")
    return [Move(unit, source, dtype or source, False) for unit in units(config)]


def plan_to_hf(found: ModelSource) -> list[Move]:
    """Plan `megatron_to_hf` from the metadata of a checkpoint."""
    published = Published(found.hf_files)
    tensors, reader = published.source.tensors, UnitReader(found.weights, published.units)
    return [
        Move(unit, reader.dtype(unit), tensors[unit.entry.hf_names[0]].dtype, True,
             len(reader.pieces(unit)))
        for unit in published.units
    ]  # fmt: skip


def peak_bytes(planned: Sequence[Move]) -> int:
    """Return the anonymous memory of the whole conversion at its peak."""
    return BASE_BYTES + max(move.held_bytes for move in planned)


def rows(planned: Sequence[Move]) -> Iterator[str]:
    """Yield a line per unit, then the totals."""
    for move in planned:
        unit = move.unit
        yield (
            f"{size_text(move.target_bytes):>12}  {list(unit.sizes)} at {list(unit.offsets)} of "
            f"{unit.key}  {', '.join(unit.entry.hf_names)}"
        )
    total, peak = sum(move.target_bytes for move in planned), peak_bytes(planned)
    largest = max(planned, key=lambda move: move.source_bytes)
    size, names = largest.source_bytes, ", ".join(largest.unit.entry.hf_names)
    if not largest.to_published:
        files = split_units([move.unit for move in planned], largest.target, FILE_BYTES)
        yield f"files            {len(files)} of at most {size_text(FILE_BYTES)} or one tensor"
    yield f"tensors          {sum(len(move.unit.entry.hf_names) for move in planned)}"
    yield f"bytes to write   {total} ({size_text(total)})"
    yield f"largest tensor   {size} ({size_text(size)}): {names}"
    yield (
        f"peak memory      {peak} ({size_text(peak)}) predicted; "
        f"twice the largest and 1 GiB are {size_text(2 * size + 2**30)}"
    )
