"""Units into the tensor files of a distributed checkpoint, one at a time, in files that last.

In: a folder, units, and a function that makes a unit's parameter. Out: `__N_0.distcp` files and
`.metadata`, by torch's own writer, whose planner is asked for each tensor when its turn comes
(Megatron-Core's `save` has all of them made first). Each file is written as a rank of its own
would. When one is on the disk, a note says what is in it: a later call with the same units keeps
the file if it still is what the note says, and if the caller finds its values right.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
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
from torch.distributed.checkpoint.planner import (
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import WriteResult

from megatron_sr1.checkpoint.disk import Measure, forget_pages, measure
from megatron_sr1.conversion.units import Unit
from megatron_sr1.runtime.files import write_text

FILE_BYTES = 2**30  # a conversion that was stopped begins again at the last file
MakeUnit = Callable[[Unit], torch.Tensor]


def split_units(units: Sequence[Unit], dtype: torch.dtype, file_bytes: int) -> list[list[Unit]]:
    """The units of each file, in order; a file has at least one."""
    files: list[list[Unit]] = []
    room = 0
    for unit in units:
        size = unit.num_values * dtype.itemsize
        if size > room:
            files.append([])
            room = file_bytes
        files[-1].append(unit)
        room -= size
    return files


class UnitWriter:
    """Tensor files in a folder that is not a checkpoint yet.

    Args:
        folder: there already.
        notes: folder for the notes, there already.
        units: all that the checkpoint is to hold.
        dtype: to store them in.
        file_bytes: of tensors in a file.

    Attributes:
        names: of the files.
        measures: of the files that are on the disk.
    """

    def __init__(
        self,
        folder: Path,
        notes: Path,
        units: Sequence[Unit],
        dtype: torch.dtype,
        file_bytes: int = FILE_BYTES,
    ) -> None:
        """Plan the files; nothing is written."""
        self.folder, self.notes = folder, notes
        self.files = split_units(units, dtype, file_bytes)
        plans = [SavePlan([_write_item(unit, dtype) for unit in part]) for part in self.files]
        self._planner = _OnDemand(flatten_state_dict=False)
        self._planner.set_up_planner({}, is_coordinator=True)
        plans, self._metadata = self._planner.create_global_plan(plans)
        self._writer = _Writer(folder, sync_files=False)
        self._plans = self._writer.prepare_global_plan(plans)
        self.names = [f"__{number}_0.distcp" for number in range(len(plans))]
        self.measures: dict[str, Measure] = {}
        self._results: dict[str, list[WriteResult]] = {}

    def keep_finished(self, is_right: Callable[[Sequence[Unit]], bool]) -> int:
        """Keep what an earlier call left on the disk.

        Args:
            is_right: whether the folder, now readable, holds the right values of some units.

        Returns:
            how many numbers the kept files hold.
        """
        for name, plan in zip(self.names, self._plans, strict=True):
            note = self._read_note(name, plan)
            if note is not None:
                self.measures[name], self._results[name] = note
        if not self.measures:
            return 0
        self._finish()
        for name, part in zip(self.names, self.files, strict=True):
            if name in self.measures and not is_right(part):
                del self.measures[name], self._results[name]
        pairs = zip(self.names, self.files, strict=True)
        return sum(u.num_values for name, part in pairs if name in self.measures for u in part)

    def write(self, make: MakeUnit) -> None:
        """Write the files that are not there, and the metadata of all.

        Args:
            make: gives a unit's parameter in the stored type.

        Raises:
            OSError, RuntimeError: the disk is full or a file cannot be written.
        """
        self._planner.make = {(u.key, u.offsets): (u, make) for part in self.files for u in part}
        with _without_crc(), ThreadPoolExecutor(max_workers=1) as pool:
            noted: Future[None] | None = None
            for name, plan in zip(self.names, self._plans, strict=True):
                if name in self.measures:
                    continue
                self._results[name] = self._writer.write_data(plan, self._planner).value()
                # One file is brought to the disk and measured while the next is written.
                if noted is not None:
                    noted.result()
                noted = pool.submit(self._note, name)
            if noted is not None:
                noted.result()
        self._finish()

    def _finish(self) -> None:
        results = [self._results[name] for name in self.names if name in self._results]
        self._writer.finish(self._metadata, results)

    def _note_path(self, name: str) -> Path:
        return self.notes / f"{name}.json"

    def _note(self, name: str) -> None:
        self.measures[name] = found = measure(self.folder / name, sync=True)
        forget_pages(self.folder / name)
        places = [(r.storage_data.offset, r.storage_data.length) for r in self._results[name]]
        note = {"bytes": found.num_bytes, "digest": found.digest, "places": places}
        write_text(self._note_path(name), json.dumps(note), sync=True)

    def _read_note(self, name: str, plan: SavePlan) -> tuple[Measure, list[WriteResult]] | None:
        """What a note says, if the file is as it says."""
        try:
            note = json.loads(self._note_path(name).read_text(encoding="utf-8"))
            noted = Measure(note["bytes"], note["digest"])
            if measure(self.folder / name) != noted:
                return None
            places = zip(plan.items, note["places"], strict=True)
            return noted, [
                WriteResult(item.index, length, _StorageInfo(name, offset, length))
                for item, (offset, length) in places
            ]
        except (OSError, ValueError, KeyError, TypeError):
            return None


class _OnDemand(DefaultSavePlanner):
    """Makes a tensor when the writer comes to it."""

    make: dict[tuple[str, tuple[int, ...]], tuple[Unit, MakeUnit]]

    def resolve_data(self, write_item: Any) -> torch.Tensor:
        """The unit of an item, with the dimension of the layers."""
        unit, make = self.make[write_item.index.fqn, tuple(write_item.index.offset)]
        return make(unit).contiguous().view(unit.sizes)


class _Writer(FileSystemWriter):
    def storage_meta(self) -> StorageMeta:
        """No path of this machine and no random name: equal weights make equal files."""
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


@contextlib.contextmanager
def _without_crc() -> Iterator[None]:
    """Torch's CRC-32 of each tensor costs more than all else; the manifest has a SHA-256."""
    former = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(former)
