"""Megatron distributed checkpoints of a run: saved whole or not at all, resumed under any layout.

In: model, optimizer, schedule and a JSON state. Out: `DIR/step_N/` with

    .metadata, common.pt, *.distcp   model and optimizer (megatron.core.dist_checkpointing)
    rng_R.pt                         generators of rank R
    state.json                       step, layout, schedule, and what the caller keeps
    hf_files/                        configuration, tokenizer and weight headers of the published
                                     model, so that the folder is a model by itself

and `DIR/latest`, a text file that names the folder to resume from. A folder gets its name when all
ranks have written; `latest` is replaced after that, and older folders go last.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_sr1.checkpoint.folders import (
    LATEST,
    STATE,
    latest_step,
    remove_old,
    step_names,
    steps,
    write_text,
)
from megatron_sr1.checkpoint.hf import load_hf
from megatron_sr1.checkpoint.hf_writer import replace_directory
from megatron_sr1.checkpoint.rng import restore_rng, rng_state
from megatron_sr1.checkpoint.sharded import load_tensors, save_tensors
from megatron_sr1.checkpoint.source import INDEX, SINGLE, HFSource
from megatron_sr1.errors import CheckpointError
from megatron_sr1.model.hf_config import HFConfig
from megatron_sr1.runtime.groups import Groups

log = logging.getLogger(__name__)

HF_FILES = "hf_files"
FORMAT = 1


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


def load_model(
    chunks: Sequence[Any], source: ModelSource, hf_config: HFConfig, groups: Groups
) -> None:
    """Fill the chunks from a model directory of either kind; collective over all ranks.

    Raises:
        CheckpointError: the weights are not those of the model.
    """
    if source.kind == "huggingface":
        load_hf(chunks, source.weights, hf_config, groups)
    else:
        load_tensors(source.weights, chunks, None)


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
    """
    folder = Path(directory)
    target, partial = folder / f"step_{step}", folder / f".step_{step}.partial"
    is_writer = groups.world.rank == 0
    if is_writer:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier(group=groups.world.process_group)
    save_tensors(partial, chunks, optimizer)
    torch.save(rng_state(), partial / f"rng_{groups.world.rank}.pt")
    dist.barrier(group=groups.world.process_group)
    if is_writer:
        if source_directory is not None:
            HFSource(source_directory).copy_without_weights(partial / HF_FILES)
        record = {
            "format": FORMAT,
            "step": step,
            "layout": _layout(groups),
            "scheduler": None if scheduler is None else scheduler.state_dict(),
            "state": dict(state),
        }
        write_text(partial / STATE, json.dumps(record, indent=2) + "\n")
        replace_directory(partial, target)
        write_text(folder / LATEST, target.name + "\n")
        remove_old(folder, step, keep_last)
    dist.barrier(group=groups.world.process_group)
    return target


def load_checkpoint(
    directory: str | Path,
    chunks: Sequence[Any],
    optimizer: Any,
    scheduler: Any,
    groups: Groups,
    step: int | None = None,
) -> dict[str, Any]:
    """Continue from a checkpoint, under the same layout or another; collective over all ranks.

    Args:
        directory: folder of the run's checkpoints.
        chunks: the model, wrapped for training or not.
        optimizer: Megatron's optimizer, or None to load the model alone.
        scheduler: its learning-rate schedule as it was made, or None.
        groups: the layout.
        step: which checkpoint; None takes the latest.

    Returns:
        the JSON state that was saved. Generators are restored only under the layout that they
        were saved under; under another they stay as they were seeded.

    Raises:
        CheckpointError: there is none, it is damaged, or it is of another model.
    """
    step = latest_step(directory) if step is None else step
    if step is None:
        raise CheckpointError(f"{directory}: no checkpoint; looked for {LATEST} and step_N folders")
    folder = Path(directory) / f"step_{step}"
    record = _read_state(folder)
    load_tensors(folder, chunks, optimizer)
    if scheduler is not None and record["scheduler"] is not None:
        scheduler.load_state_dict(record["scheduler"])
    if record["layout"] == _layout(groups):
        path = folder / f"rng_{groups.world.rank}.pt"
        restore_rng(torch.load(path, map_location="cpu", weights_only=True))
    else:
        log.info("%s: saved under %s, resumed under another layout", folder, record["layout"])
    return dict(record["state"])


def _layout(groups: Groups) -> dict[str, int]:
    return {
        "tensor": groups.tensor.size,
        "pipeline": groups.pipeline.size,
        "context": groups.context.size,
        "data": groups.data.size,
    }


def _read_state(folder: Path) -> dict[str, Any]:
    path = folder / STATE
    try:
        record = json.loads(path.read_text())
    except FileNotFoundError:
        there = step_names(steps(folder.parent)) or "nothing"
        raise CheckpointError(f"{path}: no such file; complete here: {there}") from None
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from None
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise CheckpointError(f"{path}: expected format {FORMAT} of a checkpoint's state")
    return record
