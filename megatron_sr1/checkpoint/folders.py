"""The folders of a run's checkpoints: which are complete, which is the latest, which go."""

from __future__ import annotations

import re
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path

from megatron_sr1.checkpoint.manifest import is_whole
from megatron_sr1.errors import CheckpointError

LATEST, STATE = "latest", "state.json"
MAX_NAME_BYTES = 100


def latest_step(directory: str | Path) -> int | None:
    """Step to resume from: what `latest` names, or else the newest complete folder; None if none.

    Raises:
        CheckpointError: `latest` names a folder that is not there.
    """
    folder = Path(directory)
    if (folder / LATEST).is_file():
        with (folder / LATEST).open("rb") as file:
            name = file.read(MAX_NAME_BYTES).decode(errors="replace").strip()
        found = re.fullmatch(r"step_(0|[1-9][0-9]*)", name)
        if not found or not (folder / name / STATE).is_file():
            there = step_names(whole_steps(folder)) or "there is none"
            raise CheckpointError(
                f"{folder / LATEST} names {name!r}, which is not there or not complete; write the "
                f"name of a complete folder into it ({there})"
            )
        return int(found[1])
    # Of damaged ones only, the newest: loading it says what is wrong with it.
    return max(whole_steps(folder) or steps(folder), default=None)


def steps(folder: Path) -> list[int]:
    """Steps of the checkpoints in a folder, ascending, damaged ones too."""
    names = (p.parent.name for p in folder.glob(f"step_*/{STATE}"))
    found = [re.fullmatch(r"step_(0|[1-9][0-9]*)", name) for name in names]
    return sorted(int(match[1]) for match in found if match)


def whole_steps(folder: Path) -> list[int]:
    """Steps of the checkpoints whose files are all there with their sizes, ascending."""
    return [step for step in steps(folder) if is_whole(folder / f"step_{step}")]


def step_names(steps: Sequence[int]) -> str:
    """The folders of some steps, for messages."""
    return ", ".join(f"step_{step}" for step in steps)


def other_steps(folder: Path) -> str:
    """What to do about a damaged `step_N` folder, naming the complete ones beside it."""
    others = [s for s in whole_steps(folder.parent) if f"step_{s}" != folder.name]
    if not others:
        return "no other complete checkpoint is beside it: fetch its files again, or start anew"
    return (
        f"fetch its files again, or write the name of another into {folder.parent / LATEST} to go "
        f"on from there; complete by their sizes: {step_names(others)}"
    )


def remove_remains(folder: Path, busy: Collection[str] = ()) -> None:
    """Remove what saves and removals that were cut short have left, but folders named `busy`."""
    for partial in folder.glob(".step_*"):
        if partial.name not in busy:
            shutil.rmtree(partial, ignore_errors=True)
