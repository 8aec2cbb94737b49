"""Write units into the tensor files of a distributed checkpoint, one at a time.

`__N_0.distcp` files and `.metadata` are written by torch's own writer, whose planner makes each
tensor when its turn comes (Megatron-Core's `save` takes all of them at once); each file as a rank
of its own would write it. When one is on the disk, a note records what is in it: a later call with
the same units keeps the file if it matches its note and the caller finds its values right.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.utils.serialization import config

from megatron_sr1.checkpoint.disk import Measure, flush_and_evict, measure
from megatron_sr1.conversion.units import Unit
from megatron_sr1.runtime.files import write_text

FILE_BYTES = 2**30  # a conversion that was stopped continues at the last file
MakeUnit = Callable[[Unit], torch.Tensor]


def split_units(units: Sequence[Unit], dtype: torch.dtype, file_bytes: int) -> list[list[Unit]]:
    """Return the units of each file, in order; a file has at least one."""
    files: list[list[Unit]] = []
    left = 0
    for unit in units:
        size = unit.num_values * dtype.itemsize
        if size > left:
            files.append([])
            left = file_bytes
        files[-1].append(unit)
        left -= size
    return files


class UnitWriter:
    """Tensor files of up to `file_bytes` in a directory that is not a checkpoint yet.

    `files` has the units of each file by its name, `measures` what is on the disk already.
    """

    def __init__(
        self, folder: Path, notes: Path, units: Sequence[Unit], dtype: torch.dtype, file_bytes: int
    ) -> None:
        """Plan the files; nothing is written."""
        self.folder, self.notes = folder, notes
        parts = split_units(units, dtype, file_bytes)
        self.files = {f"__{number}_0.distcp": part for number, part in enumerate(parts)}
        self.measures: dict[str, Measure] = {}
        self._results: dict[str, list[WriteResult]] = {}
        self._planner = _OnDemand(flatten_state_dict=False)
        self._planner.set_up_planner({}, is_coordinator=True)
        plans, self._metadata = self._planner.create_global_plan(
            [SavePlan([_write_item(unit, dtype) for unit in part]) for part in parts]
        )
        self._writer = _Writer(folder, sync_files=False)
        plans = self._writer.prepare_global_plan(plans)
        self._plans = dict(zip(self.files, plans, strict=True))

    def keep_finished(self, is_right: Callable[[Sequence[Unit]], bool]) -> int:
        """Keep what an earlier call left on the disk, and return the number of values in it.

        The directory can be read as a checkpoint when `is_right` is called with units.
        """
        for name in self.files:
            self._read_note(name)
        if self.measures:
            self._write_metadata()
        for name in list(self.measures):
            if not is_right(self.files[name]):
                del self.measures[name], self._results[name]
        return sum(unit.num_values for name in self.measures for unit in self.files[name])

    def write(self, make: MakeUnit) -> None:
        """Write the files that are not there, and the metadata of all.

        `make` returns a unit's parameter in the stored type. Raises OSError or RuntimeError if the
        disk is full or a file cannot be written.
        """
        self._planner.make = make
        self._planner.units = {(u.key, u.offsets): u for part in self.files.values() for u in part}
        # torch's CRC-32 of each tensor costs most, and the manifest has a SHA-256.
        no_crc = config.patch("save.compute_crc32", False)
        with no_crc, ThreadPoolExecutor(max_workers=1) as pool:
            noted: Future[None] = pool.submit(lambda: None)
            for name in [name for name in self.files if name not in self.measures]:
                written = self._writer.write_data(self._plans[name], self._planner)
                self._results[name] = written.value()
                # One file is flushed to the disk and measured while the next is written.
                noted.result()
                noted = pool.submit(self._note, name)
            noted.result()
        self._write_metadata()

    def _write_metadata(self) -> None:
        results = [self._results[name] for name in self.files if name in self._results]
        self._writer.finish(self._metadata, results)

    def _note(self, name: str) -> None:
        self.measures[name] = found = measure(self.folder / name, sync=True)
        flush_and_evict(self.folder / name)
        places = [(r.storage_data.offset, r.storage_data.length) for r in self._results[name]]
        note = {"bytes": found.num_bytes, "digest": found.digest, "places": places}
        write_text(self.notes / f"{name}.json", json.dumps(note), sync=True)

    def _read_note(self, name: str) -> None:
        """Take a file as written, if it is as its note says."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            note = json.loads((self.notes / f"{name}.json").read_text(encoding="utf-8"))
            found = measure(self.folder / name)
            if found == Measure(note["bytes"], note["digest"]):
                places = zip(self._plans[name].items, note["places"], strict=True)
                self._results[name] = [
                    WriteResult(item.index, length, _StorageInfo(name, offset, length))
                    for item, (offset, length) in places
                ]
                self.measures[name] = found


class _OnDemand(DefaultSavePlanner):
    """Makes a tensor when the writer comes to it."""

    make: MakeUnit
    units: dict[tuple[str, tuple[int, ...]], Unit]

    def resolve_data(self, write_item: Any) -> torch.Tensor:
        """Return the unit of an item, with the dimension of the layers."""
        unit = self.units[write_item.index.fqn, tuple(write_item.index.offset)]
        return self.make(unit).contiguous().view(unit.sizes)


class _Writer(FileSystemWriter):
    def storage_meta(self) -> StorageMeta:
        """Leave out this machine's path and a random name: equal weights make equal files."""
        return StorageMeta()


def _write_item(unit: Unit, dtype: torch.dtype) -> WriteItem:
    offsets = torch.Size(unit.offsets)
    return WriteItem(
        index=MetadataIndex(unit.key, offsets),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=ChunkStorageMetadata(offsets, torch.Size(unit.sizes)),
            properties=TensorProperties(dtype=dtype),
            size=torch.Size(unit.global_shape),
        ),
    )
