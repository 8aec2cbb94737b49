"""Read units from a distributed checkpoint, one at a time, and compare them with published tensors.

In: a checkpoint that any layout wrote, and a unit. Out: the unit's parameter, put together by
torch's own reader from the pieces that overlap it. Memory: the unit, and its largest piece if there
are several.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.utils import _create_file_view

from megatron_sr1.checkpoint.disk import read_ahead
from megatron_sr1.checkpoint.manifest import listed
from megatron_sr1.checkpoint.transforms import Slice
from megatron_sr1.checkpoint.untrusted import DAMAGE, check_folder
from megatron_sr1.conversion.units import Published, Unit
from megatron_sr1.errors import CheckpointError
from megatron_sr1.runtime.groups import reason


class UnitReader:
    """A checkpoint's directory, opened for reading some units.

    Raises:
        CheckpointError: not to be trusted, damaged, or of another model.
    """

    def __init__(self, folder: Path, units: Sequence[Unit]) -> None:
        """Check the metadata; no tensor is read."""
        self.folder = folder
        self.metadata = check_folder(folder)
        problems = [p for p in map(self._problem, units) if p]
        if problems:
            raise CheckpointError(
                f"{folder}: not of the model that its configuration describes: {listed(problems)}"
            )

    def dtype(self, unit: Unit) -> torch.dtype:
        """Return the type that a unit is stored in."""
        dtype = self.metadata.state_dict_metadata[unit.key].properties.dtype
        assert isinstance(dtype, torch.dtype)
        return dtype

    def num_pieces(self, unit: Unit) -> int:
        """Return the number of ranks' pieces that a unit consists of."""
        return len(self._pieces(unit))

    def read(self, unit: Unit) -> torch.Tensor:
        """Read a unit's parameter, without the dimension of the layers.

        Raises:
            CheckpointError: the file is cut off, or an entry in it is no tensor of this shape.
        """
        pieces = self._pieces(unit)
        try:
            if len(pieces) == 1:
                return self._load(unit, pieces[0]).reshape(unit.parameter_shape)
            # Zeros: what a hostile checkpoint leaves out must not be whatever was in memory.
            whole = torch.zeros(unit.sizes, dtype=self.dtype(unit))
            for piece in pieces:
                _part(whole, piece.dest_offsets, piece.lengths).copy_(self._load(unit, piece))
        except (*DAMAGE, OSError) as error:
            raise CheckpointError(f"{self.folder}: {unit.key}: {reason(error)}") from error
        return whole.view(unit.parameter_shape)

    def _load(self, unit: Unit, piece: ReadItem) -> torch.Tensor:
        """Read a piece as torch's `FileSystemReader` does, but without copying it."""
        place = self.metadata.storage_data[piece.storage_index]
        with (self.folder / place.relative_path).open("rb") as file:
            read_ahead(file.fileno(), place.offset, place.length)
            view = _create_file_view(file, place.offset, place.length)
            tensor = torch.load(view, map_location="cpu", weights_only=True)
        part = _part(tensor, piece.storage_offsets, piece.lengths)
        if part.shape != torch.Size(piece.lengths) or part.dtype != self.dtype(unit):
            raise ValueError(f"{list(part.shape)} {part.dtype} in {place.relative_path}")
        return part

    def files_of(self, unit: Unit) -> list[str]:
        """Return the names of the files that hold a unit."""
        places = self.metadata.storage_data
        return sorted({places[piece.storage_index].relative_path for piece in self._pieces(unit)})

    def _pieces(self, unit: Unit) -> list[ReadItem]:
        wanted = ChunkStorageMetadata(torch.Size(unit.offsets), torch.Size(unit.sizes))
        stored = self.metadata.state_dict_metadata[unit.key]
        return create_read_items_for_chunk_list(unit.key, stored, [wanted])

    def _problem(self, unit: Unit) -> str:
        """Return why a unit cannot be read, or ""."""
        stored = self.metadata.state_dict_metadata.get(unit.key)
        if not hasattr(stored, "chunks"):
            return f"{unit.key} is missing"
        came, expected = tuple(stored.size), unit.global_shape
        if unit.entry.form == "vocabulary":  # rows beyond the vocabulary are padding
            expected = (max(came[:1] + expected[:1]), *expected[1:])
        if came != expected:
            return f"{unit.key} is {list(came)}, expected {list(unit.global_shape)}"
        if sum(math.prod(piece.lengths) for piece in self._pieces(unit)) != unit.num_values:
            return f"{unit.key} from {list(unit.offsets)} is not there as a whole"
        return ""


def _part(tensor: torch.Tensor, offsets: Sequence[int], lengths: Sequence[int]) -> torch.Tensor:
    for dim, (begin, length) in enumerate(zip(offsets, lengths, strict=True)):
        tensor = tensor.narrow(dim, begin, length)
    return tensor


def differences(
    published: Published, reader: UnitReader, parts: Sequence[Unit], *, to_published: bool
) -> Iterator[str]:
    """Compare tensors bit by bit.

    Args:
        published: one side, with weights.
        reader: of the other.
        parts: to compare.
        to_published: True if the published side was made from the other; the values are rounded
            to the type of the side that was made.

    Yields:
        After each unit, the names of its tensors that differ, with their files, or "".
    """
    for unit in parts:
        found = []
        for name, stored in published.tensors(unit, reader.read(unit)):
            other = published.source.read(Slice(name))
            dtype = other.dtype if to_published else stored.dtype
            # As bytes, so that equal is equal, NaN included.
            sides = [side.to(dtype).contiguous().view(torch.uint8) for side in (stored, other)]
            if not torch.equal(*sides):
                files = ", ".join(reader.files_of(unit))
                found.append(f"{name} ({published.source.tensors[name].file}; {files})")
        yield ", ".join(found)
