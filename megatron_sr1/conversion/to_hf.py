"""A distributed checkpoint to published weights, a tensor at a time.

In: a checkpoint that any layout wrote, of a run or converted. Out: a directory like the one that
its model came from: the same names, types, files and index.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from megatron_sr1.checkpoint.disk import check_room, forget_pages
from megatron_sr1.checkpoint.folders import ModelSource
from megatron_sr1.checkpoint.hf_files import StoredTensor, replace_directory, write_tensor
from megatron_sr1.checkpoint.loading import verify_source
from megatron_sr1.checkpoint.mapping import HF_EMBEDDING, HF_OUTPUT
from megatron_sr1.conversion.published import (
    Meter,
    Published,
    Report,
    bits,
    claimed,
    compare,
    need_empty,
    told_when_full,
)
from megatron_sr1.conversion.reader import UnitReader
from megatron_sr1.errors import CheckpointError
from megatron_sr1.runtime.collectives import single_process
from megatron_sr1.runtime.files import sync_directory

UNFINISHED = ".partial"


def megatron_to_hf(found: ModelSource, target: Path, digests: bool, report: Report) -> None:
    """Write the published form of a checkpoint; what was begun is finished.

    Args:
        found: the checkpoint.
        target: new directory.
        digests: compare the digests of the checkpoint's files first, not only their sizes.
        report: is told how far it is.

    Raises:
        CheckpointError: the source is damaged or of another model, the target is not empty, or the
            disk is full.
    """
    need_empty(target)
    groups = single_process()
    verify_source(found, groups, digests=False)
    with ThreadPoolExecutor(max_workers=1) as pool:
        checked = pool.submit(verify_source, found, groups, digests)
        partial = target.with_name(f".{target.name}.partial")
        try:
            with claimed(partial):
                _write_all(found, partial, report)
                checked.result()  # nothing gets its name before
                replace_directory(partial, target)
                sync_directory(target.resolve().parent)
        except CheckpointError:
            checked.result()  # what damage did is said better by what the damage is
            raise


def _write_all(found: ModelSource, partial: Path, report: Report) -> None:
    """Write all files of a directory into a folder."""
    export = _Export(Published.open(found.hf_files), found.weights, report)
    names = export.files_to_write(partial)
    needed = export.meter.total_bytes - export.meter.done_bytes
    check_room(partial, needed)
    with told_when_full(partial, needed), ThreadPoolExecutor(max_workers=1) as pool:
        export.published.source.copy_other_files(partial)
        synced: Future[None] | None = None
        for name in names:
            export.write(partial / (name + UNFINISHED), name)
            # One file is brought to the disk while the next is written.
            if synced is not None:
                synced.result()
            synced = pool.submit(_finish, partial / (name + UNFINISHED), partial / name)
        if synced is not None:
            synced.result()


def compare_with_megatron(found: ModelSource, made: Path, report: Report) -> None:
    """Read published weights back from the disk and compare them with the checkpoint.

    Raises:
        CheckpointError: naming tensors and files that differ.
    """
    published = Published.open(made)
    for name in published.source.headers:
        forget_pages(made / name)
    compare(published, UnitReader(found.weights, published.units), report, to_published=True)


class _Export:
    """The weight files of a directory, each by itself.

    Args:
        published: headers of the files.
        weights: folder of the checkpoint.
        report: is told how far it is.
    """

    def __init__(self, published: Published, weights: Path, report: Report) -> None:
        self.published = published
        self.reader = UnitReader(weights, published.units)
        self.meter = Meter("writing", self._bytes_of(*published.source.headers), report)
        self.unit_of = {name: unit for unit in published.units for name in unit.entry.hf_names}
        self.unit_of.setdefault(HF_OUTPUT, self.unit_of[HF_EMBEDDING])

    def files_to_write(self, partial: Path) -> list[str]:
        """Names of the files that an earlier call has not finished; what else it left goes."""
        kept = [n for n in self.published.source.headers if self._is_right(partial / n, n)]
        for path in partial.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name not in kept:
                path.unlink()
        self.meter.keep(self._bytes_of(*kept))
        return [name for name in self.published.source.headers if name not in kept]

    def write(self, path: Path, name: str) -> None:
        """Write a file, not yet to the disk."""
        with path.open("wb") as file:
            file.write(self.published.source.headers[name])
            for stored, tensor in self._tensors(name):
                write_tensor(file, stored, tensor)
                self.meter.add(stored.num_bytes)

    def _is_right(self, path: Path, name: str) -> bool:
        """Whether a file is there, with the values of the checkpoint."""
        if not path.is_file():
            return False
        header = self.published.source.headers[name]
        with path.open("rb") as file:
            if file.read(len(header)) != header:
                return False
            for stored, tensor in self._tensors(name):
                there = bytearray(stored.num_bytes)
                file.seek(stored.begin)
                file.readinto(there)
                expected = bits(tensor.to(stored.dtype)).flatten()
                if not torch.equal(torch.frombuffer(there, dtype=torch.uint8), expected):
                    return False
        return True

    def _tensors(self, name: str) -> Iterator[tuple[StoredTensor, torch.Tensor]]:
        """A file's tensors, by unit, so that each unit is read once."""
        found = self.published.source.tensors
        mine = {n: t for n, t in found.items() if t.file == name}
        in_order = sorted(mine, key=lambda n: mine[n].begin)
        for unit in dict.fromkeys(self.unit_of[n] for n in in_order):
            for published_name, tensor in self.published.tensors(unit, self.reader.read(unit)):
                if published_name in mine:
                    yield mine[published_name], tensor

    def _bytes_of(self, *names: str) -> int:
        tensors = self.published.source.tensors.values()
        return sum(t.num_bytes for t in tensors if t.file in names)


def _finish(path: Path, final: Path) -> None:
    """Give a file its name when it is on the disk."""
    forget_pages(path)
    path.rename(final)
    sync_directory(final.parent)
