"""Save a run atomically, at once or in the background, and prune old checkpoints.

1. `begin_save` makes `.step_N.partial` and has the tensors written as they are now.
2. `Save.finish` waits until all ranks have written, writes the manifest, renames the directory to
   `step_N` and moves `latest`. Until it has returned there is no checkpoint.
3. `remove_old` removes the checkpoints that are not to be kept, by the ratings in their states.

All run in the main thread, so that collectives of a save never interleave with those of training.
A save that fails stops the run with its cause, in the background too.
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

from megatron_sr1.checkpoint import folders
from megatron_sr1.checkpoint.disk import MANIFEST, Measure, measure, write_record
from megatron_sr1.checkpoint.folders import steps, whole_steps
from megatron_sr1.checkpoint.hf_files import HFSource, replace_directory
from megatron_sr1.checkpoint.tensors import PendingTensors, Trained, save_tensors
from megatron_sr1.config.training import CheckpointConfig
from megatron_sr1.errors import CheckpointError
from megatron_sr1.runtime.files import sync_directory, write_text
from megatron_sr1.runtime.groups import Groups, on_all_ranks, on_writer
from megatron_sr1.runtime.rng import rng_state

log = logging.getLogger(__name__)
EVALUATION = "evaluation"


@dataclass(frozen=True)
class Save:
    """A checkpoint that is written in `partial` and becomes `target`."""

    target: Path
    partial: Path
    groups: Groups
    tensors: PendingTensors

    def finish(self) -> None:
        """Wait for the tensors, write the manifest, publish; collective; raises as `begin_save`."""
        with _whole_or_not(self.target, self.partial, self.groups):
            write_manifest(self.partial, self.groups, known=self.tensors.finish())
            on_writer(self.groups, lambda: publish_folder(self.partial, self.target))


def begin_save(
    directory: str | Path,
    step: int,
    trained: Trained,
    state: Mapping[str, Any],
    source_directory: str | Path | None = None,
    in_background: bool = False,
) -> Save:
    """Begin to save everything that a resumed run needs; collective over all ranks.

    All ranks see `directory`, the run's checkpoints; `state` has the JSON values that
    `load_checkpoint` returns. The model came from `source_directory`, a Hugging Face directory or
    `hf_files` of a checkpoint; without it the checkpoint can be resumed from, but is no model. With
    `in_background`, a process of each rank writes the tensors as they are; they may then change.

    Raises `CheckpointError` if the disk is full, a file cannot be written, or a writing process
    died; earlier checkpoints are untouched.
    """
    folder, groups = Path(directory), trained.groups
    target, partial = folder / f"step_{step}", folder / f".step_{step}.partial"

    def make_partial() -> None:
        if target.exists() and folders.latest_step(folder) == step:
            # For a moment there would be no checkpoint at all.
            raise CheckpointError(f"{target.name} is there already, and {folders.LATEST} names it")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)

    def save_rng() -> None:
        held = io.BytesIO()
        torch.save(rng_state(), held)
        # Torch's own writer does not report a full disk.
        (partial / f"rng_{groups.world.rank}.pt").write_bytes(held.getvalue())

    def describe() -> None:
        if source_directory is not None:
            HFSource(source_directory).copy_without_weights(partial / folders.HF_FILES)
        folders.write_state(partial, step, trained.layout, trained.scheduler, state)

    with _whole_or_not(target, partial, groups):
        on_writer(groups, make_partial)
        tensors = save_tensors(partial, trained, in_background)
        on_all_ranks(groups, save_rng)
        on_writer(groups, describe)
    return Save(target, partial, groups, tensors)


class SaveQueue:
    """The saves of a run that are being written, the oldest first; the same on all ranks."""

    def __init__(self, directory: Path, settings: CheckpointConfig) -> None:
        """Start with no saves in the run's directory of checkpoints."""
        self.directory, self.settings = directory, settings
        self._saves: list[Save] = []

    def __len__(self) -> int:
        """Return the number of saves that are not finished."""
        return len(self._saves)

    @property
    def is_writing(self) -> bool:
        """True while this rank writes the oldest of them."""
        return bool(self._saves) and not self._saves[0].tensors.is_done

    def add(
        self, step: int, trained: Trained, state: Mapping[str, Any], source_directory: Path | None
    ) -> None:
        """Begin a save as `begin_save`, after finishing the oldest where the limit is reached."""
        in_background = self.settings.asynchronous
        while len(self._saves) >= (self.settings.max_in_flight if in_background else 1):
            log.info("waiting for the save of %s", self._saves[0].target.name)
            self.finish_oldest()
        if not self._saves:  # otherwise some are still being written
            on_writer(trained.groups, lambda: remove_remains(self.directory))
        save = begin_save(self.directory, step, trained, state, source_directory, in_background)
        self._saves.append(save)
        if not in_background:
            self.finish_oldest()

    def finish_oldest(self) -> None:
        """Wait for the oldest of them, publish it, remove old ones; collective over all ranks."""
        save = self._saves.pop(0)
        save.finish()
        on_writer(save.groups, lambda: remove_old(save.target, self.settings))

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
            f"{target} was not saved: {error}; free space or remove the cause, then start the same "
            "command again: it resumes from the checkpoint before"
        ) from error


def write_manifest(folder: Path, groups: Groups, known: Mapping[str, Measure]) -> None:
    """Measure all ranks' files and flush them to the disk, but for the known; collective."""

    def with_files(known: Mapping[str, Measure], *patterns: str) -> dict[str, Measure]:
        files = [path for pattern in patterns for path in folder.rglob(pattern) if path.is_file()]
        names = {file.relative_to(folder).as_posix() for file in files} - known.keys() - {MANIFEST}
        return {**known, **{name: measure(folder / name, sync=True) for name in names}}

    # Megatron-Core names a rank's files so; rank 0 measures all others.
    rank = groups.world.rank
    parts = on_all_ranks(groups, lambda: with_files(known, f"__{rank}_*", f"rng_{rank}.pt"))
    measures = {name: found for part in parts for name, found in part.items()}
    on_writer(groups, lambda: write_record(folder, with_files(measures, "*")))


def publish_folder(partial: Path, target: Path) -> None:
    """Give a complete checkpoint its name and move `latest` to it; on one rank."""
    for folder in sorted(p for p in partial.rglob("*") if p.is_dir()):
        sync_directory(folder)
    replace_directory(partial, target)
    sync_directory(target.parent)
    write_text(target.parent / folders.LATEST, target.name + "\n", sync=True)


def remove_old(newest: Path, settings: CheckpointConfig) -> None:
    """Remove the checkpoints that are not to be kept, and damaged ones; the newest always stays."""
    folder, step = newest.parent, int(newest.name.removeprefix("step_"))
    # Later ones, left when a run was rolled back, are kept.
    present, whole = ([s for s in found(folder) if s <= step] for found in (steps, whole_steps))
    if settings.keep_last < 1 or not whole:
        return
    best = _best_steps(folder, whole, settings)
    if best:
        log.info("best by %s: %s", settings.best_by, folders.step_names(best))
    for old in present:
        if old not in whole[-settings.keep_last :] and old not in best:
            # Renamed first: a removal that is cut short must not look like a checkpoint.
            gone = (folder / f"step_{old}").rename(folder / f".step_{old}.old")
            shutil.rmtree(gone, ignore_errors=True)


def remove_remains(folder: Path) -> None:
    """Remove what saves and removals that were cut short have left."""
    for partial in folder.glob(".step_*"):
        shutil.rmtree(partial, ignore_errors=True)


def _best_steps(folder: Path, whole: list[int], settings: CheckpointConfig) -> list[int]:
    """Return the steps with the best ratings, the best first; of equal ratings the later step."""
    way, metric = settings.best_by.split()
    rated = []
    for step in whole:
        with contextlib.suppress(OSError, CheckpointError):
            rates = folders.read_state(folder / f"step_{step}")["state"].get(EVALUATION)
            value: Any = rates.get(metric) if isinstance(rates, dict) else None
            if type(value) in (int, float) and math.isfinite(value):
                rated.append((value if way == "max" else -value, step))
    return [step for _, step in sorted(rated, reverse=True)[: settings.keep_best]]
