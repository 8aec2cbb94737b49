"""Megatron distributed checkpoints of a run: saved whole or not at all, resumed under any layout.

In: model, optimizer, schedule and a JSON state. Out: `DIR/step_N/` with

    .metadata, common.pt, *.distcp   model and optimizer (megatron.core.dist_checkpointing)
    rng_R.pt                         generators of rank R
    state.json                       step, layout, schedule, and what the caller keeps
    hf_files/                        configuration, tokenizer and weight headers of the published
                                     model, so that the folder is a model by itself
    manifest.json                    size and digest of all these files

and `DIR/latest`, a text file that names the folder to resume from. A folder gets its name when all
of it is on the disk; `latest` is replaced after that, and older folders go last. On loading, the
files are compared with the manifest first.
"""

from __future__ import annotations

import io
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_sr1.checkpoint.files import sync_directory, write_text
from megatron_sr1.checkpoint.folders import (
    LATEST,
    STATE,
    latest_step,
    remove_old,
    remove_remains,
)
from megatron_sr1.checkpoint.hf_writer import replace_directory
from megatron_sr1.checkpoint.manifest import write_manifest
from megatron_sr1.checkpoint.model_source import HF_FILES
from megatron_sr1.checkpoint.rng import restore_rng, rng_state
from megatron_sr1.checkpoint.sharded import load_tensors, save_tensors
from megatron_sr1.checkpoint.source import HFSource
from megatron_sr1.checkpoint.state import layout_of, read_state, write_state
from megatron_sr1.checkpoint.together import on_writer, reason, together
from megatron_sr1.checkpoint.untrusted import DAMAGE
from megatron_sr1.checkpoint.verify import verify_folder
from megatron_sr1.errors import CheckpointError
from megatron_sr1.runtime.groups import Groups

log = logging.getLogger(__name__)


def save_checkpoint(
    directory: str | Path,
    step: int,
    chunks: Sequence[Any],
    optimizer: Any,
    scheduler: Any,
    groups: Groups,
    state: Mapping[str, Any],
    keep_last: int = 0,
    source_directory: str | Path | None = None,
) -> Path:
    """Save everything that a resumed run needs; collective over all ranks.

    Args:
        directory: folder of the run's checkpoints, seen by all ranks.
        step: number of the checkpoint.
        chunks: the model, wrapped for training or not.
        optimizer: Megatron's optimizer, or None.
        scheduler: its learning-rate schedule, or None.
        groups: the layout.
        state: JSON values to be given back by `load_checkpoint`.
        keep_last: checkpoints to keep, this one included; 0 keeps all.
        source_directory: Hugging Face directory that the model came from (or `hf_files` of a
            checkpoint); without it the checkpoint can be resumed from, but is no model directory.

    Returns:
        the checkpoint's folder.

    Raises:
        CheckpointError: the disk is full, a file cannot be written, or a process that wrote ended;
            what was saved before is untouched.
    """
    folder = Path(directory)
    target, partial = folder / f"step_{step}", folder / f".step_{step}.partial"
    is_writer = groups.world.rank == 0
    try:
        on_writer(groups, lambda: _make_partial(target, partial))
        save_tensors(partial, chunks, optimizer, groups)
        together(groups, lambda: _save_rng(partial / f"rng_{groups.world.rank}.pt"))

        def describe() -> None:
            if source_directory is not None:
                HFSource(source_directory).copy_without_weights(partial / HF_FILES)
            write_state(partial, step, layout_of(groups), scheduler, state)

        on_writer(groups, describe)
        write_manifest(partial, groups)
        on_writer(groups, lambda: publish_folder(partial, target, keep_last))
    except CheckpointError as error:
        if is_writer:  # its room is needed, if only to say what happened
            shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f"{target} was not saved: {error}; make room or mend the cause, then start the same "
            "command again: it goes on from the checkpoint before"
        ) from error
    return target


def _make_partial(target: Path, partial: Path) -> None:
    """An empty folder to save into, and none of an earlier attempt."""
    if target.exists() and latest_step(target.parent) == int(target.name.removeprefix("step_")):
        # For a moment there would be no checkpoint at all.
        raise CheckpointError(f"{target.name} is there already, and {LATEST} names it")
    remove_remains(target.parent)
    partial.mkdir(parents=True)


def _save_rng(path: Path) -> None:
    held = io.BytesIO()
    torch.save(rng_state(), held)
    path.write_bytes(held.getvalue())  # torch's own writer does not say that a disk is full


def publish_folder(partial: Path, target: Path, keep_last: int) -> None:
    """Give a finished checkpoint its name, then point to it, then remove what is too old."""
    for folder in sorted(p for p in partial.rglob("*") if p.is_dir()):
        sync_directory(folder)
    replace_directory(partial, target)
    sync_directory(target.parent)
    write_text(target.parent / LATEST, target.name + "\n")
    remove_old(target.parent, int(target.name.removeprefix("step_")), keep_last)


def load_checkpoint(
    directory: str | Path,
    chunks: Sequence[Any],
    optimizer: Any,
    scheduler: Any,
    groups: Groups,
    step: int | None = None,
    verify: bool = True,
) -> dict[str, Any]:
    """Continue from a checkpoint, under the same layout or another; collective over all ranks.

    Args:
        directory: folder of the run's checkpoints.
        chunks: the model, wrapped for training or not.
        optimizer: Megatron's optimizer, or None to load the model alone.
        scheduler: its learning-rate schedule as it was made, or None.
        groups: the layout.
        step: which checkpoint; None takes the latest.
        verify: compare the files' digests, not only their sizes.

    Returns:
        the JSON state that was saved. Generators are restored only under the layout that they
        were saved under; under another they stay as they were seeded.

    Raises:
        CheckpointError: there is none, it is damaged, or it is of another model. Of damaged files
            it names the first few, and the complete checkpoints beside.
    """
    step = latest_step(directory) if step is None else step
    if step is None:
        raise CheckpointError(f"{directory}: no checkpoint; looked for {LATEST} and step_N folders")
    folder = Path(directory) / f"step_{step}"
    record = read_state(folder)
    if record["step"] != step:
        raise CheckpointError(f"{folder / STATE}: it is the state of step_{record['step']}")
    verify_folder(folder, groups, verify, record["format"])
    load_tensors(folder, chunks, optimizer)
    if scheduler is not None and record["scheduler"] is not None:
        try:
            scheduler.load_state_dict(record["scheduler"])
        except (KeyError, TypeError, ValueError, AssertionError) as error:
            raise CheckpointError(f"{folder / STATE}: no schedule: {reason(error)}") from None
    if record["layout"] == layout_of(groups):
        _load_rng(folder / f"rng_{groups.world.rank}.pt")
    else:
        log.info("%s: saved under %s, resumed under another layout", folder, record["layout"])
    return dict(record["state"])


def _load_rng(path: Path) -> None:
    try:
        restore_rng(torch.load(path, map_location="cpu", weights_only=True))
    except (*DAMAGE, OSError) as error:
        raise CheckpointError(f"{path} is refused or damaged: {reason(error)}") from None
