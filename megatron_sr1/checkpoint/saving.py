"""Saves of a run: whole or not at all, at once or in the background; and which checkpoints stay.

In: model, optimizer, schedule and a JSON state. Out: the directory that loading.py describes.

1. `begin_save` makes `.step_N.partial` and has the tensors written as they are now.
2. `Save.finish` waits until all ranks have written, writes the manifest, renames the directory to
   `step_N` and moves `latest`. Until it has returned there is no checkpoint.
3. `remove_old` removes the checkpoints that need not stay, by the ratings in their own states.

All run in the main thread, so that no collective of a save meets training's own. A save that fails
ends the run with its cause, in the background too.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_sr1.checkpoint.folders import (
    HF_FILES,
    LATEST,
    latest_step,
    read_state,
    step_names,
    steps,
    write_state,
)
from megatron_sr1.checkpoint.hf_files import HFSource, replace_directory
from megatron_sr1.checkpoint.manifest import MANIFEST, Measure, is_whole, measure, write_record
from megatron_sr1.checkpoint.tensors import PendingTensors, Trained, save_tensors
from megatron_sr1.errors import CheckpointError
from megatron_sr1.runtime.files import sync_directory, write_text
from megatron_sr1.runtime.groups import Groups, on_all_ranks, on_writer
from megatron_sr1.runtime.rng import rng_state

log = logging.getLogger(__name__)
EVALUATION = "evaluation"


@dataclass(frozen=True)
class Keep:
    """Which checkpoints stay after a save.

    Attributes:
        last: number of the newest ones, 0 for all.
        best: number of the best ones, which may be among the newest as well.
        best_by: `max` or `min`, and a rate of the evaluation.
    """

    last: int = 0
    best: int = 0
    best_by: str = "max accuracy"


@dataclass(frozen=True)
class Save:
    """A checkpoint in `partial`, which becomes `target`; `tensors` is None if they are written."""

    target: Path
    partial: Path
    groups: Groups
    tensors: PendingTensors | None

    @property
    def is_done(self) -> bool:
        """True if this rank's part of `finish` need not wait."""
        return self.tensors is None or self.tensors.is_done

    def finish(self) -> Path:
        """Wait for the tensors, write the manifest, publish; collective over all ranks.

        Returns the checkpoint's directory. Raises `CheckpointError` if it could not be written;
        earlier checkpoints are untouched.
        """
        with _whole_or_not(self.target, self.partial, self.groups):
            known = self.tensors.finish() if self.tensors is not None else {}
            write_manifest(self.partial, self.groups, known)
            on_writer(self.groups, lambda: publish_folder(self.partial, self.target))
        return self.target


def begin_save(
    directory: str | Path,
    step: int,
    trained: Trained,
    state: Mapping[str, Any],
    source_directory: str | Path | None = None,
    in_background: bool = False,
) -> Save:
    """Begin to save everything that a resumed run needs; collective over all ranks.

    Args:
        directory: checkpoints of the run, seen by all ranks.
        step: number of the checkpoint.
        trained: model, optimizer and schedule.
        state: JSON values that `load_checkpoint` returns.
        source_directory: Hugging Face directory that the model came from (or `hf_files` of a
            checkpoint); without it the checkpoint can be resumed from, but is no model directory.
        in_background: leave the tensors to a process of each rank; they may be changed afterwards.

    Raises:
        CheckpointError: the disk is full, a file cannot be written, or a writing process died;
            earlier checkpoints are untouched.
    """
    folder, groups = Path(directory), trained.groups
    target, partial = folder / f"step_{step}", folder / f".step_{step}.partial"
    with _whole_or_not(target, partial, groups):
        on_writer(groups, lambda: _make_partial(target, partial))
        tensors = save_tensors(partial, trained, in_background)
        on_all_ranks(groups, lambda: _save_rng(partial / f"rng_{groups.world.rank}.pt"))

        def describe() -> None:
            if source_directory is not None:
                HFSource(source_directory).copy_without_weights(partial / HF_FILES)
            write_state(partial, step, trained.layout, trained.scheduler, state)

        on_writer(groups, describe)
    return Save(target, partial, groups, tensors)


class SaveQueue:
    """The saves of a run that are being written, the oldest first; the same on all ranks.

    Args:
        directory: checkpoints of the run.
        keep: which of them stay.
        limit: saves that are written in the background at most; 0 finishes each save at once.
    """

    def __init__(self, directory: Path, keep: Keep, limit: int) -> None:
        """Start with no saves."""
        self.directory, self.keep, self.limit = directory, keep, limit
        self._saves: list[Save] = []

    def __len__(self) -> int:
        """Return the number of saves that are not finished."""
        return len(self._saves)

    @property
    def is_writing(self) -> bool:
        """True while this rank writes the oldest of them."""
        return bool(self._saves) and not self._saves[0].is_done

    def add(
        self, step: int, trained: Trained, state: Mapping[str, Any], source_directory: Path | None
    ) -> None:
        """Begin a save as `begin_save`, after finishing the oldest where the limit is reached."""
        while len(self._saves) >= max(self.limit, 1):
            log.info("waiting for the save of %s", self._saves[0].target.name)
            self.finish_oldest()
        if not self._saves:  # otherwise some are still being written
            on_writer(trained.groups, lambda: remove_remains(self.directory))
        in_background = self.limit > 0
        save = begin_save(self.directory, step, trained, state, source_directory, in_background)
        self._saves.append(save)
        if not in_background:
            self.finish_oldest()

    def finish_oldest(self) -> None:
        """Wait for the oldest of them, publish it, remove old ones; collective over all ranks."""
        save = self._saves.pop(0)
        save.finish()
        on_writer(save.groups, lambda: remove_old(save.target, self.keep))

    def finish_all(self) -> None:
        """Wait for all of them; collective over all ranks."""
        while self._saves:
            self.finish_oldest()


@contextlib.contextmanager
def _whole_or_not(target: Path, partial: Path, groups: Groups) -> Iterator[None]:
    """On an error, remove what was written and say which checkpoint failed and what to do."""
    try:
        yield
    except CheckpointError as error:
        if groups.world.rank == 0:  # the log may need the space
            shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f"{target} was not saved: {error}; make room or remove the cause, then start the same "
            "command again: it resumes from the checkpoint before"
        ) from error


def _make_partial(target: Path, partial: Path) -> None:
    """Make an empty directory to save into."""
    if target.exists() and latest_step(target.parent) == int(target.name.removeprefix("step_")):
        # For a moment there would be no checkpoint at all.
        raise CheckpointError(f"{target.name} is there already, and {LATEST} names it")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)


def _save_rng(path: Path) -> None:
    held = io.BytesIO()
    torch.save(rng_state(), held)
    path.write_bytes(held.getvalue())  # torch's own writer does not report a full disk


def write_manifest(
    folder: Path, groups: Groups, known: Mapping[str, Measure] | None = None
) -> None:
    """Measure all ranks' files and flush them to the disk, but for the known; collective."""
    rank, known = groups.world.rank, dict(known or {})

    def measure_own() -> dict[str, Measure]:
        # Megatron-Core names a rank's files so; rank 0 measures all others.
        mine = (f"__{rank}_*", f"rng_{rank}.pt")
        names = sorted({p.name for pattern in mine for p in folder.glob(pattern)} - known.keys())
        return known | {name: measure(folder / name, sync=True) for name in names}

    measures: dict[str, Measure] = {}
    for part in on_all_ranks(groups, measure_own):
        measures |= part

    def write() -> None:
        there = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
        for name in sorted(there - measures.keys() - {MANIFEST}):
            measures[name] = measure(folder / name, sync=True)
        write_record(folder, measures)

    on_writer(groups, write)


def publish_folder(partial: Path, target: Path) -> None:
    """Give a complete checkpoint its name and move `latest` to it; on one rank."""
    for folder in sorted(p for p in partial.rglob("*") if p.is_dir()):
        sync_directory(folder)
    replace_directory(partial, target)
    sync_directory(target.parent)
    write_text(target.parent / LATEST, target.name + "\n", sync=True)


def remove_old(newest: Path, keep: Keep) -> None:
    """Remove the checkpoints that need not stay, and damaged ones; the newest always stays.

    Later ones, of a run that was set back, are left alone.
    """
    folder, step = newest.parent, int(newest.name.removeprefix("step_"))
    present = [s for s in steps(folder) if s <= step]
    whole = [s for s in present if is_whole(folder / f"step_{s}")]
    if keep.last < 1 or not whole:
        return
    best = _best_steps(folder, whole, keep)
    if best:
        log.info("best by %s: %s", keep.best_by, step_names(best))
    for old in present:
        if old not in whole[-keep.last :] and old not in best:
            # Renamed first: a removal that is cut short must not look like a checkpoint.
            gone = (folder / f"step_{old}").rename(folder / f".step_{old}.old")
            shutil.rmtree(gone, ignore_errors=True)


def remove_remains(folder: Path) -> None:
    """Remove what saves and removals that were cut short have left."""
    for partial in folder.glob(".step_*"):
        shutil.rmtree(partial, ignore_errors=True)


def _best_steps(folder: Path, whole: list[int], keep: Keep) -> list[int]:
    """Return the steps with the best ratings, the best first; of equal ratings the later step."""
    way, metric = keep.best_by.split()
    rated = []
    for step in whole:
        rating = _rating(folder / f"step_{step}", metric)
        if rating is not None:
            rated.append((rating if way == "max" else -rating, step))
    return [step for _, step in sorted(rated, reverse=True)[: keep.best]]


def _rating(folder: Path, metric: str) -> float | None:
    """Return what the evaluation of a checkpoint gave; None if there is no readable number."""
    try:
        rates = read_state(folder)["state"].get(EVALUATION)
    except (OSError, CheckpointError):
        return None
    value = rates.get(metric) if isinstance(rates, dict) else None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)
