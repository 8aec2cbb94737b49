"""Published weights to a distributed checkpoint and back, a tensor at a time, in one process.

`hf_to_megatron` writes a directory of checkpoints with one `step_0`, to be loaded under any layout
by any supported Megatron-Core: the values besides the tensors are in `common.pt`, the older form,
which newer releases read too. It holds no generators, and its state has no layout. Neither way
makes a model or imports Megatron.

A conversion that is called again after it was stopped keeps the files that are finished and right.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path

import torch

from megatron_sr1.checkpoint.disk import (
    TENSOR_OVERHEAD_BYTES,
    check_space,
    flush_and_evict,
    listed,
    write_failure,
)
from megatron_sr1.checkpoint.folders import HF_FILES, ModelSource, write_state
from megatron_sr1.checkpoint.hf_files import HFSource, StoredTensor, replace_directory, tensor_bytes
from megatron_sr1.checkpoint.loading import verify_source
from megatron_sr1.checkpoint.mapping import HF_EMBEDDING, HF_OUTPUT
from megatron_sr1.checkpoint.saving import publish_folder, write_manifest
from megatron_sr1.checkpoint.transforms import join
from megatron_sr1.conversion.units import Published, Unit, UnitReader, differences
from megatron_sr1.conversion.writer import FILE_BYTES, UnitWriter
from megatron_sr1.errors import CheckpointError
from megatron_sr1.runtime.files import sync_directory
from megatron_sr1.runtime.groups import reason, single_process

# What is being done ("kept", "writing", "comparing"), bytes that are done, bytes in all.
Report = Callable[[str, int, int], None]
STEP = "step_0"
UNFINISHED = ".partial"
BACKENDS = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


def hf_to_megatron(
    directory: Path,
    target: Path,
    dtype: torch.dtype | None,
    report: Report,
    file_bytes: int = FILE_BYTES,
) -> None:
    """Write a checkpoint of published weights, as files of up to `file_bytes` of tensors.

    A `dtype` of None keeps the source's, float32 where it mixes types. Raises `CheckpointError` if
    the source is no such model, the target is not empty, or the disk is full.
    """
    published = Published(directory)
    published.source.need_weights()
    dtype = dtype or published.dtype
    partial, notes = target / f".{STEP}.partial", target / f".{STEP}.notes"
    _need_empty(target, but=(partial.name, notes.name))
    with claimed(partial):
        notes.mkdir(exist_ok=True)
        writer = UnitWriter(partial, notes, published.units, dtype, file_bytes)
        _write_other_files(partial, published.source, keep=writer.files)

        def is_right(parts: Sequence[Unit]) -> bool:
            reader = UnitReader(partial, parts)
            return not any(differences(published, reader, to_published=False))

        done = writer.keep_finished(is_right) * dtype.itemsize
        total = sum(unit.num_values for unit in published.units) * dtype.itemsize
        if done:
            report("kept", done, done)

        def make(unit: Unit) -> torch.Tensor:
            nonlocal done
            tensors = [published.source.read(name) for name in unit.entry.hf_names]
            parts = [part for tensor in tensors for part in tensor.chunk(unit.entry.num_parts)]
            done += unit.num_values * dtype.itemsize
            report("writing", done, total)
            return join(unit.entry, parts).to(dtype)

        overhead = TENSOR_OVERHEAD_BYTES * len(published.units)
        with _space_checked(partial, total - done + overhead):
            writer.write(make)
            write_manifest(partial, single_process(), writer.measures)
            publish_folder(partial, target / STEP)
            shutil.rmtree(notes)


def _write_other_files(partial: Path, source: HFSource, keep: Collection[str]) -> None:
    """Write all of a checkpoint that is no tensor; remove everything that is not to be kept."""
    _remove_others(partial, keep)
    nothing = io.BytesIO()
    torch.save({}, nothing)
    (partial / "common.pt").write_bytes(nothing.getvalue())
    (partial / "metadata.json").write_text(json.dumps(BACKENDS), encoding="utf-8")
    source.copy_without_weights(partial / HF_FILES)
    write_state(partial, 0, {}, None, {"converted_from": source.directory.resolve().name})


def megatron_to_hf(found: ModelSource, target: Path, digests: bool, report: Report) -> None:
    """Write the published form of a checkpoint into a new directory.

    With `digests`, its files are compared with the manifest's digests, not only by size. Raises
    `CheckpointError` if the source is damaged or of another model, the target is not empty, or the
    disk is full.
    """
    _need_empty(target)
    groups = single_process()
    verify_source(found, groups, digests=False)
    with ThreadPoolExecutor(max_workers=1) as pool:
        checked = pool.submit(verify_source, found, groups, digests)
        partial = target.with_name(f".{target.name}.partial")
        try:
            with claimed(partial):
                _export(found, partial, report)
                checked.result()  # nothing gets its name before
                replace_directory(partial, target)
                sync_directory(target.resolve().parent)
        except CheckpointError:
            checked.result()  # prefer the checksum error: it names the cause
            raise


def _export(found: ModelSource, partial: Path, report: Report) -> None:
    """Write the weight files that an earlier call has not finished; remove everything else."""
    published = Published(found.hf_files)
    reader = UnitReader(found.weights, published.units)
    headers, tensors = published.source.headers, published.source.tensors.values()
    kept = [
        name for name, header in headers.items()
        if _is_right(partial / name, header, _tensors_of(published, reader, name))
    ]  # fmt: skip
    _remove_others(partial, kept)
    total = sum(t.num_bytes for t in tensors)
    done = sum(t.num_bytes for t in tensors if t.file in kept)
    if done:
        report("kept", done, done)
    with _space_checked(partial, total - done), ThreadPoolExecutor(max_workers=1) as pool:
        published.source.copy_other_files(partial)
        synced: Future[None] = pool.submit(lambda: None)
        for name in [name for name in headers if name not in kept]:
            unfinished = partial / (name + UNFINISHED)
            with unfinished.open("wb") as file:
                file.write(headers[name])
                for stored, tensor in _tensors_of(published, reader, name):
                    file.seek(stored.begin)
                    file.write(tensor_bytes(stored, tensor))
                    done += stored.num_bytes
                    report("writing", done, total)
            # One file is flushed to the disk while the next is written.
            synced.result()
            synced = pool.submit(_finish, unfinished, partial / name)
        synced.result()


def _tensors_of(
    published: Published, reader: UnitReader, name: str
) -> Iterator[tuple[StoredTensor, torch.Tensor]]:
    """Yield a weight file's tensors, by unit, so that each unit is read once."""
    mine = {n: t for n, t in published.source.tensors.items() if t.file == name}
    unit_of = {n: unit for unit in published.units for n in unit.entry.hf_names}
    unit_of.setdefault(HF_OUTPUT, unit_of[HF_EMBEDDING])
    in_order = sorted(mine, key=lambda n: mine[n].begin)
    for unit in dict.fromkeys(unit_of[n] for n in in_order):
        for published_name, tensor in published.tensors(unit, reader.read(unit)):
            if published_name in mine:
                yield mine[published_name], tensor


def _is_right(
    path: Path, header: bytes, tensors: Iterator[tuple[StoredTensor, torch.Tensor]]
) -> bool:
    """Return True if a weight file is there, with this header and these values."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        if file.read(len(header)) != header:
            return False
        for stored, tensor in tensors:
            file.seek(stored.begin)
            if file.read(stored.num_bytes) != tensor_bytes(stored, tensor):
                return False
    return True


def _finish(unfinished: Path, final: Path) -> None:
    """Give a file its name when it is on the disk."""
    flush_and_evict(unfinished)
    unfinished.rename(final)
    sync_directory(final.parent)


def verify_conversion(
    directory: Path, checkpoint: ModelSource, report: Report, *, to_published: bool
) -> None:
    """Compare both sides on the disk bit by bit; raise `CheckpointError` with what differs."""
    published, weights = Published(directory), checkpoint.weights
    reader = UnitReader(weights, published.units)
    headers, tensors = published.source.headers, published.source.tensors
    for path in [directory / n for n in headers] if to_published else weights.glob("*.distcp"):
        flush_and_evict(path)
    sizes = [sum(tensors[n].num_bytes for n in u.entry.hf_names) for u in published.units]
    different = []
    found = differences(published, reader, to_published=to_published)
    for done, names in zip(accumulate(sizes), found, strict=True):
        different += [names] if names else []
        report("comparing", done, sum(sizes))
    if different:
        raise CheckpointError(
            f"{directory} and {weights} differ in {listed(different)}; remove what was "
            "converted and convert again"
        )


def _need_empty(target: Path, but: Collection[str] = ()) -> None:
    """Raise `CheckpointError` if a target is a file, or holds anything but what is named."""
    others = [path for path in target.glob("*") if path.name not in but]
    if others or (target.exists() and not target.is_dir()):
        raise CheckpointError(f"{target} is there already; name a new or an empty directory")


def _remove_others(partial: Path, keep: Collection[str]) -> None:
    for path in partial.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in keep:
            path.unlink()


@contextlib.contextmanager
def claimed(partial: Path) -> Iterator[None]:
    """Make an unfinished directory and lock it, or raise if another process writes to it."""
    partial.mkdir(parents=True, exist_ok=True)
    handle = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise CheckpointError(f"{partial}: another conversion is writing there") from None
    finally:
        os.close(handle)


@contextlib.contextmanager
def _space_checked(folder: Path, needed: int) -> Iterator[None]:
    """Check the free space; turn errors of writing into `CheckpointError`s that name the cause."""
    check_space(folder, needed)
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            f"{write_failure(folder, needed, reason(error))}; free space and start the same "
            "command again: it continues after the last finished file"
        ) from error
