"""The folders of a run's checkpoints: which are complete, which is the latest, which go."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from megatron_sr1.errors import CheckpointError

LATEST, STATE = "latest", "state.json"


def latest_step(directory: str | Path) -> int | None:
    """Step to resume from: what `latest` names, or else the newest complete folder; None if none.

    Raises:
        CheckpointError: `latest` names a folder that is not there.
    """
    folder = Path(directory)
    if (folder / LATEST).is_file():
        name = (folder / LATEST).read_text().strip()
        found = re.fullmatch(r"step_(\d+)", name)
        if not found or not (folder / name / STATE).is_file():
            there = step_names(steps(folder)) or "there is none"
            raise CheckpointError(
                f"{folder / LATEST} names {name!r}, which is not there or not complete; write the "
                f"name of a complete folder into it ({there})"
            )
        return int(found[1])
    return max(steps(folder), default=None)


def steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints in a folder, ascending."""
    found = [re.fullmatch(r"step_(\d+)", p.parent.name) for p in folder.glob(f"step_*/{STATE}")]
    return sorted(int(match[1]) for match in found if match)


def step_names(steps: Sequence[int]) -> str:
    """The folders of some steps, for messages."""
    return ", ".join(f"step_{step}" for step in steps)


def write_text(path: Path, text: str) -> None:
    """Replace a file at once, with its contents on the disk."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def remove_old(folder: Path, step: int, keep_last: int) -> None:
    """Remove complete checkpoints before the last `keep_last` up to a step, and broken remains."""
    for partial in folder.glob(".step_*"):
        shutil.rmtree(partial, ignore_errors=True)
    if keep_last > 0:
        for old in [s for s in steps(folder) if s <= step][:-keep_last]:
            # Out of sight first: a removal that is cut short must not look like a checkpoint.
            gone = (folder / f"step_{old}").rename(folder / f".step_{old}.old")
            shutil.rmtree(gone, ignore_errors=True)
