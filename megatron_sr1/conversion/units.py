"""What a conversion moves at a time, a unit: published tensors, and their place in a checkpoint.

A checkpoint of Megatron-Core holds global tensors, whatever the layout: the layers of a decoder are
stacked along a dimension of their own, a norm before a linear layer is named as in Transformer
Engine's fused layer (megatron/core/models/gpt/gpt_layer_specs.py), and gate and up are halves of
one tensor. Tests compare these places with Megatron's own `sharded_state_dict`.

Units are read by torch's own reader from the pieces that overlap them. Memory: the unit, and its
largest piece if there are several.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.utils import _create_file_view

from megatron_sr1.checkpoint.disk import listed, read_ahead
from megatron_sr1.checkpoint.hf import check_tensors, with_tied_copy
from megatron_sr1.checkpoint.hf_files import HFSource
from megatron_sr1.checkpoint.mapping import FUSED_NORMS, Entry, entries
from megatron_sr1.checkpoint.transforms import publish
from megatron_sr1.checkpoint.untrusted import DAMAGE, check_folder
from megatron_sr1.errors import CheckpointError
from megatron_sr1.model.hf_config import HFConfig, read_hf_config
from megatron_sr1.runtime.groups import reason

_LAYER = re.compile(r"((?:vision|language)_model)\.decoder\.layers\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Unit:
    """The smallest part that is moved: a parameter, or a half of one that stacks two tensors.

    Attributes:
        entry: published tensors and form; a half is an entry of its own here, plain.
        key: name of the global tensor in a checkpoint.
        global_shape: of that tensor, vocabulary rows not padded.
        offsets: where the unit begins in it.
        sizes: of the unit in it, with the dimension of the layers.
    """

    entry: Entry
    key: str
    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def parameter_shape(self) -> tuple[int, ...]:
        """Shape without the dimension of the layers."""
        return self.sizes[-min(2, len(self.entry.hf_shapes[0])) :]

    @property
    def num_values(self) -> int:
        """Number of values in the unit."""
        return math.prod(self.sizes)


def units(config: HFConfig) -> tuple[Unit, ...]:
    """Return all units of a model, in the order of computation."""
    return tuple(unit for entry in entries(config) for unit in _units_of(entry, config))


def _units_of(entry: Entry, config: HFConfig) -> Iterator[Unit]:
    key, layers, layer = entry.name, list[int](), list[int]()
    found = _LAYER.fullmatch(entry.name)
    if found:
        tower, number, rest = found.groups()
        key = f"{tower}.decoder.layers.{FUSED_NORMS.get(rest, rest)}"
        layers = [config.vision.depth if tower == "vision_model" else config.text.num_layers]
        layer = [int(number)]
    columns = entry.hf_shapes[0][1:]
    if entry.form == "flat":
        columns = (math.prod(columns),)
    parts = [entry]
    if entry.form == "stacked":
        pairs = zip(entry.hf_names, entry.hf_shapes, strict=True)
        parts = [replace(entry, hf_names=(n,), hf_shapes=(s,), form="plain") for n, s in pairs]
    rows = [sum(shape[0] for shape in part.hf_shapes) for part in parts]
    for number, part in enumerate(parts):
        yield Unit(
            entry=part,
            key=key,
            global_shape=(*layers, sum(rows), *columns),
            offsets=(*layer, sum(rows[:number]), *(0 for _ in columns)),
            sizes=(*(1 for _ in layer), rows[number], *columns),
        )


class Published:
    """The published side of a conversion: a directory, or the headers that a checkpoint carries."""

    def __init__(self, directory: Path) -> None:
        """Read headers and configuration; raise `CheckpointError` if they do not agree."""
        self.config, self.source = read_hf_config(directory), HFSource(directory)
        check_tensors(self.source, self.config)
        self.units = units(self.config)

    @property
    def dtype(self) -> torch.dtype:
        """Type of all tensors; float32 holds a mixture without loss."""
        types = {tensor.dtype for tensor in self.source.tensors.values()}
        return types.pop() if len(types) == 1 else torch.float32

    def tensors(self, unit: Unit, parameter: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the published tensors of a unit's parameter, a tied copy included."""
        return with_tied_copy(publish(unit.entry, [parameter]), self.source, self.config)


class UnitReader:
    """A checkpoint's directory, opened for reading some units."""

    def __init__(self, folder: Path, units: Sequence[Unit]) -> None:
        """Check the metadata; raise `CheckpointError` if hostile, damaged or of another model."""
        self.folder, self.units = folder, units
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

    def read(self, unit: Unit) -> torch.Tensor:
        """Read a unit's parameter, without the dimension of the layers.

        Raises `CheckpointError` if a file is cut off, or an entry in it is no tensor of this shape.
        """
        pieces = self.pieces(unit)
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

    def pieces(self, unit: Unit) -> list[ReadItem]:
        """Return the pieces, each of a rank, that a unit consists of."""
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
        if sum(math.prod(piece.lengths) for piece in self.pieces(unit)) != unit.num_values:
            return f"{unit.key} from {list(unit.offsets)} is not there as a whole"
        return ""


def _part(tensor: torch.Tensor, offsets: Sequence[int], lengths: Sequence[int]) -> torch.Tensor:
    for dim, (begin, length) in enumerate(zip(offsets, lengths, strict=True)):
        tensor = tensor.narrow(dim, begin, length)
    return tensor


def differences(published: Published, reader: UnitReader, *, to_published: bool) -> Iterator[str]:
    """Compare tensors bit by bit, in the type of the side that was made from the other.

    Yields, after each unit of the reader, the names of its tensors that differ and their files.
    """
    places = reader.metadata.storage_data
    for unit in reader.units:
        found = []
        for name, stored in published.tensors(unit, reader.read(unit)):
            other = published.source.read(name)
            dtype = other.dtype if to_published else stored.dtype
            # As bytes, so that equal is equal, NaN included.
            sides = [side.to(dtype).contiguous().view(torch.uint8) for side in (stored, other)]
            if not torch.equal(*sides):
                files = {places[piece.storage_index].relative_path for piece in reader.pieces(unit)}
                file = published.source.tensors[name].file
                found.append(f"{name} ({file}; {', '.join(sorted(files))})")
        yield ", ".join(found)
