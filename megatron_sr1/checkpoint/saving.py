"""Saves of a run: whole or not at all, at once or in the background.

In: model, optimizer, schedule and a JSON state. Out: the directory that loading.py describes. A
save has three parts: `begin_save` notes what was there when it was called and has the tensors
written, by a process of each rank if it is to go on in the background; `Save.finish`, when all
ranks have written, lists and publishes the folder. Both are collective and in the main thread, so
that nothing of a save meets training's own collectives; until `finish` is through there is no
checkpoint. A save that fails ends the run with its cause, in the background too.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_sr1.checkpoint.disk import DIGEST, Measure, measure
from megatron_sr1.checkpoint.folders import HF_FILES, LATEST, latest_step, remove_remains
from megatron_sr1.checkpoint.hf_files import HFSource, replace_directory
from megatron_sr1.checkpoint.manifest import FORMAT, MANIFEST
from megatron_sr1.checkpoint.retention import Keep, remove_old
from megatron_sr1.checkpoint.state import layout_of, write_state
from megatron_sr1.checkpoint.tensors import PendingTensors, Trained, begin_tensors, save_tensors
from megatron_sr1.errors import CheckpointError
from megatron_sr1.runtime.collectives import on_all_ranks, on_writer
from megatron_sr1.runtime.files import sync_directory, write_text
from megatron_sr1.runtime.groups import Groups
from megatron_sr1.runtime.rng import rng_state

log = logging.getLogger(__name__)
KEEP_ALL = Keep()


@dataclass(frozen=True)
class Save:
    """A checkpoint that is being written.

    Attributes:
        target: the folder that it will be.
        partial: the folder that it is until then.
        groups: the layout.
        keep: which checkpoints stay after it.
        tensors: what the ranks' processes are writing; None: they are written.
    """

    target: Path
    partial: Path
    groups: Groups
    keep: Keep
    tensors: PendingTensors | None

    @property
    def is_done(self) -> bool:
        """Whether this rank's part of `finish` need not wait."""
        return self.tensors is None or self.tensors.is_done

    def finish(self, busy: Collection[str] = ()) -> Path:
        """Wait for the tensors, list all files, publish; collective over all ranks.

        Args:
            busy: names of the folders of other saves that are being written.

        Returns:
            the checkpoint's folder.

        Raises:
            CheckpointError: it could not be written; what was saved before is untouched.
        """
        with _whole_or_not(self.target, self.partial, self.groups):
            known = self.tensors.finish() if self.tensors is not None else {}
            write_manifest(self.partial, self.groups, known)
            on_writer(
                self.groups,
                lambda: publish_folder(self.partial, self.target, self.keep, busy),
            )
        return self.target


def save_checkpoint(*arguments: Any, **more: Any) -> Path:
    """`begin_save` and `Save.finish` at once."""
    return begin_save(*arguments, **more).finish()


def begin_save(
    directory: str | Path,
    step: int,
    trained: Trained,
    state: Mapping[str, Any],
    keep: Keep = KEEP_ALL,
    source_directory: str | Path | None = None,
    in_background: bool = False,
    busy: Collection[str] = (),
) -> Save:
    """Begin to save everything that a resumed run needs; collective over all ranks.

    Args:
        directory: checkpoints of the run, seen by all ranks.
        step: number of the checkpoint.
        trained: model, optimizer and schedule.
        state: JSON values that `load_checkpoint` returns.
        keep: which checkpoints stay, this one included.
        source_directory: Hugging Face directory that the model came from (or `hf_files` of a
            checkpoint); without it the checkpoint can be resumed from, but is no model directory.
        in_background: leave the tensors to a process of each rank; they may be changed afterwards.
        busy: names of the directories of other saves that are being written.

    Raises:
        CheckpointError: the disk is full, a file cannot be written, or a process that wrote ended;
            what was saved before is untouched.
    """
    folder, groups = Path(directory), trained.groups
    target, partial = folder / f"step_{step}", folder / f".step_{step}.partial"
    with _whole_or_not(target, partial, groups):
        on_writer(groups, lambda: _make_partial(target, partial, busy))
        tensors = None
        if in_background:
            tensors = begin_tensors(partial, trained)
        else:
            save_tensors(partial, trained)
        on_all_ranks(groups, lambda: _save_rng(partial / f"rng_{groups.world.rank}.pt"))

        def describe() -> None:
            if source_directory is not None:
                HFSource(source_directory).copy_without_weights(partial / HF_FILES)
            write_state(partial, step, layout_of(groups), trained.scheduler, state)

        on_writer(groups, describe)
    return Save(target, partial, groups, keep, tensors)


class SaveQueue:
    """The saves of a run that are being written, the oldest first; alike on all ranks.

    Args:
        bound: so many at most; 0: each is finished at once.
    """

    def __init__(self, bound: int) -> None:
        """No saves yet."""
        self.bound = bound
        self._saves: list[Save] = []

    def __len__(self) -> int:
        """Saves that are not finished."""
        return len(self._saves)

    @property
    def is_writing(self) -> bool:
        """Whether this rank still writes the oldest of them."""
        return bool(self._saves) and not self._saves[0].is_done

    def add(self, *arguments: Any, **more: Any) -> None:
        """`begin_save`, once there is room for one more; collective over all ranks."""
        while len(self._saves) >= max(self.bound, 1):
            log.info("waiting for the save of %s", self._saves[0].target.name)
            self.finish_oldest()
        more |= {"in_background": self.bound > 0, "busy": self._busy()}
        self._saves.append(begin_save(*arguments, **more))
        if self.bound == 0:
            self.finish_oldest()

    def finish_oldest(self) -> None:
        """Wait for the oldest of them and publish it; collective over all ranks."""
        save = self._saves.pop(0)
        save.finish(self._busy())

    def finish_all(self) -> None:
        """Wait for all of them; collective over all ranks."""
        while self._saves:
            self.finish_oldest()

    def _busy(self) -> list[str]:
        return [save.partial.name for save in self._saves]


@contextlib.contextmanager
def _whole_or_not(target: Path, partial: Path, groups: Groups) -> Iterator[None]:
    """On an error, no remains, and words that name the checkpoint and what to do."""
    try:
        yield
    except CheckpointError as error:
        if groups.world.rank == 0:  # its room is needed, if only to say what happened
            shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f"{target} was not saved: {error}; make room or mend the cause, then start the same "
            "command again: it goes on from the checkpoint before"
        ) from error


def _make_partial(target: Path, partial: Path, busy: Collection[str]) -> None:
    """An empty folder to save into, and none of an earlier attempt."""
    if target.exists() and latest_step(target.parent) == int(target.name.removeprefix("step_")):
        # For a moment there would be no checkpoint at all.
        raise CheckpointError(f"{target.name} is there already, and {LATEST} names it")
    remove_remains(target.parent, busy)
    partial.mkdir(parents=True)


def _save_rng(path: Path) -> None:
    held = io.BytesIO()
    torch.save(rng_state(), held)
    path.write_bytes(held.getvalue())  # torch's own writer does not say that a disk is full


def write_manifest(
    folder: Path, groups: Groups, known: Mapping[str, Measure] | None = None
) -> None:
    """Measure all files of a folder and bring them to the disk; collective over all ranks.

    Args:
        folder: that all ranks have written to.
        groups: the layout.
        known: files of this rank that are on the disk and measured already.

    Raises:
        CheckpointError: on all ranks, if a file cannot be read or the disk is full.
    """
    rank = groups.world.rank

    def own() -> dict[str, Measure]:
        # Megatron-Core names a rank's files so; what is named otherwise is left to rank 0.
        mine = (f"__{rank}_*", f"rng_{rank}.pt")
        names = sorted(p.name for pattern in mine for p in folder.glob(pattern))
        new = {name: measure(folder / name, sync=True) for name in names if name not in found}
        return {**found, **new}

    found: dict[str, Measure] = dict(known or {})
    for part in on_all_ranks(groups, own):
        found.update(part)

    def write() -> None:
        for name in _names(folder):
            if name not in found:
                found[name] = measure(folder / name, sync=True)
        files = {n: {"bytes": m.num_bytes, "digest": m.digest} for n, m in sorted(found.items())}
        record = {"format": FORMAT, "digest": DIGEST, "files": files}
        write_text(folder / MANIFEST, json.dumps(record, indent=1) + "\n", sync=True)

    on_writer(groups, write)


def _names(folder: Path) -> list[str]:
    """All files of a folder but its manifest."""
    names = (p.relative_to(folder).as_posix() for p in sorted(folder.rglob("*")) if p.is_file())
    return [name for name in names if name != MANIFEST]


def publish_folder(partial: Path, target: Path, keep: Keep, busy: Collection[str] = ()) -> None:
    """Give a finished checkpoint its name, then point to it, then remove what is too old."""
    for folder in sorted(p for p in partial.rglob("*") if p.is_dir()):
        sync_directory(folder)
    replace_directory(partial, target)
    sync_directory(target.parent)
    write_text(target.parent / LATEST, target.name + "\n", sync=True)
    remove_old(target.parent, int(target.name.removeprefix("step_")), keep, busy)
