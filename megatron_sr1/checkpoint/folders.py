"""Directories of models and checkpoints: what kind one is, its steps, `latest`, `state.json`.

Free of torch, for the planner and the checks before a start.
"""

from __future__ import annotations

import hashlib
import json
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sr1.checkpoint.disk import DIGEST, is_whole, size_text
from megatron_sr1.errors import CheckpointError
from megatron_sr1.runtime.files import write_text
from megatron_sr1.runtime.hub import model_directory

LATEST, STATE = "latest", "state.json"
MAX_NAME_BYTES = 100
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
HF_FILES = "hf_files"
FINGERPRINTED = ("config.json", INDEX, "*.safetensors", ".metadata", "*.distcp")
FINGERPRINT = "fingerprint of model.path's weights"  # in the state of a run's checkpoint
ADAPTER = "adapter"  # in the state of a checkpoint, of which the model was not trained itself
NUM_BLOCKS, BLOCK_BYTES = 64, 4096
STATE_FORMAT = 2
WITH_MANIFEST = 2  # formats before this one had none
MAX_STATE_BYTES = 16 * 2**20
STATE_TYPES = {"format": int, "step": int, "layout": dict, "scheduler": dict | None, "state": dict}


def latest_step(directory: str | Path) -> int | None:
    """Return the step that `latest` names, or else the newest complete one; None if none.

    Raises `CheckpointError` if `latest` names a directory that is not there.
    """
    folder = Path(directory)
    if (folder / LATEST).is_file():
        with (folder / LATEST).open("rb") as file:
            name = file.read(MAX_NAME_BYTES).decode(errors="replace").strip()
        step = _step_of(name)
        if step is None or not (folder / name / STATE).is_file():
            there = step_names(whole_steps(folder)) or "there is none"
            raise CheckpointError(
                f"{folder / LATEST} names {name!r}, which is not there or not complete; write the "
                f"name of a complete directory into it ({there})"
            )
        return step
    # If all are damaged, the newest: the error on loading it says what is wrong.
    return max(whole_steps(folder) or steps(folder), default=None)


def steps(folder: Path) -> list[int]:
    """Return the steps of all checkpoints in a directory, ascending, damaged ones included."""
    found = [_step_of(path.parent.name) for path in folder.glob(f"step_*/{STATE}")]
    return sorted(step for step in found if step is not None)


def _step_of(name: str) -> int | None:
    found = re.fullmatch(r"step_(0|[1-9][0-9]*)", name)
    return int(found[1]) if found else None


def whole_steps(folder: Path) -> list[int]:
    """Return the steps of the checkpoints that are complete by their sizes, ascending."""
    return [step for step in steps(folder) if is_whole(folder / f"step_{step}")]


def step_names(steps: Sequence[int]) -> str:
    """Join the names of checkpoint directories for a message."""
    return ", ".join(f"step_{step}" for step in steps)


def other_steps(folder: Path) -> str:
    """Advise what to do about a damaged checkpoint, naming the complete ones next to it."""
    others = [s for s in whole_steps(folder.parent) if f"step_{s}" != folder.name]
    if not others:
        return "there is no other complete checkpoint: fetch its files again, or start a new run"
    return (
        f"fetch its files again, or write the name of another into {folder.parent / LATEST} to "
        f"resume from that; complete by their sizes: {step_names(others)}"
    )


@dataclass(frozen=True)
class ModelSource:
    """Where a model's weights and the files that belong to them are.

    `kind` is huggingface or megatron; `hf_files` is the Hugging Face directory with configuration
    and tokenizer, and with weights only where `kind` is huggingface.
    """

    kind: str
    weights: Path
    hf_files: Path


def resolve_model(directory: str | Path, revision: str = "") -> ModelSource:
    """Find the model in a Hugging Face directory, a directory of checkpoints, or one `step_N`.

    A hub name, `OWNER/NAME`, is looked up at a revision (main), and downloaded if needed.
    """
    path = model_directory(directory, revision)
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such directory; give a model or checkpoint directory")
    has_weights = (path / INDEX).is_file() or (path / SINGLE).is_file()
    if (path / "config.json").is_file() and has_weights:
        return ModelSource("huggingface", path, path)
    step = latest_step(path)
    folder = path if step is None else path / f"step_{step}"
    if (folder / ".metadata").is_file():
        if not (folder / HF_FILES / "config.json").is_file():
            raise CheckpointError(
                f"{folder}: a checkpoint without {HF_FILES}/config.json, so that its model's shape "
                "is not known; it can only resume its run"
            )
        kept = read_state(folder)["state"] if (folder / STATE).is_file() else {}
        if kept.get(ADAPTER):
            raise CheckpointError(
                f"{folder} holds adapters alone, of {kept.get('model.path')}, and is no model; use "
                "hf/ of its run, or merge them (tools/convert_checkpoint.py)"
            )
        return ModelSource("megatron", folder, folder / HF_FILES)
    raise CheckpointError(
        f"{path} is no model: looked for config.json with {INDEX} or {SINGLE} (Hugging Face), and "
        f"for {LATEST}, step_N directories or .metadata (Megatron); found "
        f"{', '.join(sorted(p.name for p in path.iterdir())[:12]) or 'nothing'}"
    )


def tokenizer_directory(directory: str | Path, revision: str = "") -> Path:
    """Return the directory with a model's tokenizer; weights need not be there."""
    path = model_directory(directory, revision, weights=False)
    has_files = (path / "config.json").is_file() or (path / "tokenizer_config.json").is_file()
    return path if has_files else resolve_model(path).hf_files


def fingerprint(source: ModelSource) -> str:
    """Return 32 hexadecimal digits that identify a model's weights, cheap at any size.

    They cover the names and sizes of the weight files and evenly spaced blocks of each: all of a
    file up to 256 KiB. Training moves all weights, so another model has another fingerprint; a
    single value changed by hand may go unseen.
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


def write_state(
    folder: Path, step: int, layout: Mapping[str, int], scheduler: Any, state: Mapping[str, Any]
) -> None:
    """Write `state.json` of a checkpoint, to the disk; on one rank.

    The layout is empty for a conversion, which has no ranks' generators; the scheduler is
    Megatron's learning-rate schedule or None; the state has JSON values.
    """
    position = None if scheduler is None else scheduler.state_dict()
    values = STATE_FORMAT, step, dict(layout), position, dict(state)
    record = dict(zip(STATE_TYPES, values, strict=True))
    write_text(folder / STATE, json.dumps(record, indent=2) + "\n", sync=True)


def read_state(folder: Path) -> dict[str, Any]:
    """Read `state.json` of a checkpoint, which may be damaged or written by someone else.

    Raises `CheckpointError` if it is absent, a link, too large, not JSON, or not of this form.
    """
    path = folder / STATE
    try:
        facts = path.lstat()
        if not stat.S_ISREG(facts.st_mode):  # a link could lead anywhere, a pipe never ends
            raise CheckpointError(f"{path}: a link or no regular file, which no save leaves")
        if facts.st_size > MAX_STATE_BYTES:
            raise CheckpointError(
                f"{path}: {size_text(facts.st_size)}, at most {size_text(MAX_STATE_BYTES)} expected"
            )
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        there = step_names(whole_steps(folder.parent)) or "nothing"
        raise CheckpointError(f"{path}: no such file; complete here: {there}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from None
    came = record.get("format") if isinstance(record, dict) else type(record).__name__
    if came not in range(1, STATE_FORMAT + 1):
        raise CheckpointError(
            f"{path}: format {came!r} came, expected 1 to {STATE_FORMAT} of a checkpoint's state"
        )
    for name, types in STATE_TYPES.items():
        if not isinstance(record.get(name), types) or isinstance(record[name], bool):
            raise CheckpointError(f"{path}: {name} is {str(record.get(name))[:40]!r}")
    return dict(record)
