"""Published weights to a distributed checkpoint, a tensor at a time.

In: a Hugging Face directory. Out: a folder with one checkpoint as `save_checkpoint` writes them, to
be loaded under any layout by any supported Megatron-Core: the values beside the tensors are in
`common.pt`, the older form, which newer releases read too. There are no generators in it, and its
state has no layout.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_sr1.checkpoint.disk import TENSOR_OVERHEAD_BYTES, check_room, forget_pages
from megatron_sr1.checkpoint.folders import HF_FILES, ModelSource
from megatron_sr1.checkpoint.hf_files import HFSource
from megatron_sr1.checkpoint.saving import KEEP_ALL, publish_folder, write_manifest
from megatron_sr1.checkpoint.state import write_state
from megatron_sr1.checkpoint.transforms import Slice, assemble
from megatron_sr1.conversion.published import (
    Meter,
    Published,
    Report,
    claimed,
    compare,
    differences,
    need_empty,
    told_when_full,
)
from megatron_sr1.conversion.reader import UnitReader
from megatron_sr1.conversion.units import Unit
from megatron_sr1.conversion.writer import FILE_BYTES, UnitWriter
from megatron_sr1.errors import CheckpointError
from megatron_sr1.runtime.collectives import single_process

STEP = "step_0"
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
    """Write a checkpoint of published weights; what was begun is finished.

    Args:
        directory: of the weights.
        target: new folder of checkpoints, or what a conversion that was stopped has left.
        dtype: to store; None keeps the source's, float32 where it mixes types.
        report: is told how far it is.
        file_bytes: of tensors in a file.

    Raises:
        CheckpointError: the source is no such model, the target is not empty, or the disk is full.
    """
    published = Published.open(directory)
    if not published.source.has_weights:
        raise CheckpointError(f"{directory}: headers of weight files, but not the weights")
    dtype = dtype or source_dtype(published.source)
    partial, notes = target / f".{STEP}.partial", target / f".{STEP}.notes"
    need_empty(target, but=(partial.name, notes.name))
    with claimed(partial):
        notes.mkdir(exist_ok=True)
        writer = UnitWriter(partial, notes, published.units, dtype, file_bytes)
        _put_frame(partial, published.source, keep=writer.names)

        def is_right(parts: Sequence[Unit]) -> bool:
            reader = UnitReader(partial, parts)
            return not any(differences(published, reader, parts, to_published=False))

        meter = Meter("writing", _stored_bytes(published.units, dtype), report)
        meter.keep(writer.keep_finished(is_right) * dtype.itemsize)
        needed = meter.total_bytes - meter.done_bytes + TENSOR_OVERHEAD_BYTES * len(published.units)
        check_room(partial, needed)

        def make(unit: Unit) -> torch.Tensor:
            tensors = [published.source.read(Slice(name)) for name in unit.entry.hf_names]
            meter.add(unit.num_values * dtype.itemsize)
            return assemble(unit.entry, tensors).to(dtype)

        with told_when_full(partial, needed):
            writer.write(make)
            write_manifest(partial, single_process(), writer.measures)
            publish_folder(partial, target / STEP, KEEP_ALL)


def compare_with_hf(directory: Path, made: ModelSource, report: Report) -> None:
    """Read a checkpoint back from the disk and compare it with what it was made of.

    Raises:
        CheckpointError: naming tensors and files that differ.
    """
    published = Published.open(directory)
    for path in made.weights.glob("*.distcp"):
        forget_pages(path)
    reader = UnitReader(made.weights, published.units)
    compare(published, reader, report, to_published=False)


def source_dtype(source: HFSource) -> torch.dtype:
    """Type of all tensors; float32 holds a mixture without loss."""
    types = {tensor.dtype for tensor in source.tensors.values()}
    return types.pop() if len(types) == 1 else torch.float32


def _stored_bytes(parts: Sequence[Unit], dtype: torch.dtype) -> int:
    return sum(unit.num_values for unit in parts) * dtype.itemsize


def _put_frame(partial: Path, source: HFSource, keep: Sequence[str]) -> None:
    """All of a checkpoint that is no tensor; whatever is not to be kept goes."""
    for path in partial.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in keep:
            path.unlink()
    nothing = io.BytesIO()
    torch.save({}, nothing)
    (partial / "common.pt").write_bytes(nothing.getvalue())
    (partial / "metadata.json").write_text(json.dumps(BACKENDS), encoding="utf-8")
    source.copy_without_weights(partial / HF_FILES)
    state = {"converted_from": source.directory.resolve().name}
    write_state(partial, 0, {}, None, state)
