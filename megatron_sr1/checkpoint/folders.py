"""Directories of models and checkpoints: which kind one is, which checkpoint is the latest.

In: a path that a user gives, or a run's directory of checkpoints. Out: where weights, configuration
and tokenizer are, a fingerprint that changes when the weights do, and the steps that are complete.
Free of torch, so that the planner and checks before a start can use it.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_sr1.checkpoint.disk import DIGEST
from megatron_sr1.checkpoint.manifest import is_whole
from megatron_sr1.errors import CheckpointError

LATEST, STATE = "latest", "state.json"
MAX_NAME_BYTES = 100
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
HF_FILES = "hf_files"
FINGERPRINTED = ("config.json", INDEX, "*.safetensors", ".metadata", "*.distcp")
NUM_BLOCKS, BLOCK_BYTES = 64, 4096


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


@dataclass(frozen=True)
class ModelSource:
    """Where a model's weights and the files beside them are.

    Attributes:
        kind: huggingface | megatron.
        weights: folder of the weights.
        hf_files: Hugging Face directory with configuration and tokenizer; with weights only where
            `kind` is huggingface.
    """

    kind: str
    weights: Path
    hf_files: Path


def resolve_model(directory: str | Path) -> ModelSource:
    """Tell what kind of model directory this is.

    Args:
        directory: a Hugging Face directory, a folder of checkpoints with `latest` in it, or one
            `step_N` folder of those.

    Raises:
        CheckpointError: it is none of these.
    """
    path = Path(directory)
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder; give a Hugging Face or a checkpoint folder")
    has_weights = (path / INDEX).is_file() or (path / SINGLE).is_file()
    if (path / "config.json").is_file() and has_weights:
        return ModelSource("huggingface", path, path)
    step = latest_step(path)
    folder = path if step is None else path / f"step_{step}"
    if (folder / ".metadata").is_file():
        if not (folder / HF_FILES / "config.json").is_file():
            raise CheckpointError(
                f"{folder}: a checkpoint without {HF_FILES}/config.json, so its model's shape is "
                "not known; it can resume its run, but not be a model"
            )
        return ModelSource("megatron", folder, folder / HF_FILES)
    raise CheckpointError(
        f"{path} is no model: looked for config.json with {INDEX} or {SINGLE} (Hugging Face), and "
        f"for {LATEST}, step_N folders or .metadata (Megatron); found "
        f"{', '.join(sorted(p.name for p in path.iterdir())[:12]) or 'nothing'}"
    )


def fingerprint(source: ModelSource) -> str:
    """A mark of a model directory's weights, cheap at any size.

    It covers the names and sizes of the weight files and blocks of each, evenly spread from the
    first bytes to the last: all of a file up to 256 KiB. Training moves all weights, so that
    another model has another mark; a single value changed by hand may go unseen.

    Returns:
        32 hexadecimal digits.
    """
    mark = hashlib.new(DIGEST)
    for path in sorted({p for pattern in FINGERPRINTED for p in source.weights.glob(pattern)}):
        size = path.stat().st_size
        mark.update(f"{path.name} {size}\n".encode())
        last = max(size - BLOCK_BYTES, 0)
        with path.open("rb") as file:
            for number in range(NUM_BLOCKS):
                file.seek(last * number // (NUM_BLOCKS - 1))
                mark.update(file.read(BLOCK_BYTES))
    return mark.hexdigest()[:32]
