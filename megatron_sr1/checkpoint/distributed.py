"""Megatron distributed checkpoints of a run: resumed under the same layout or another.

In: a folder of checkpoints. Out: model, optimizer and schedule filled, and a JSON state. saving.py
writes `DIR/step_N/` with

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

import contextlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_sr1.checkpoint.folders import (
    LATEST,
    STATE,
    latest_step,
)
from megatron_sr1.checkpoint.rng import restore_rng
from megatron_sr1.checkpoint.sharded import load_tensors
from megatron_sr1.checkpoint.state import layout_of, read_state
from megatron_sr1.checkpoint.together import reason
from megatron_sr1.checkpoint.untrusted import DAMAGE
from megatron_sr1.checkpoint.verify import verify_folder
from megatron_sr1.errors import CheckpointError
from megatron_sr1.runtime.groups import Groups

log = logging.getLogger(__name__)
SETTINGS = ("max_lr", "min_lr", "betas", "eps")


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
        scheduler: its learning-rate schedule as it was made, or None; its place is loaded, while
            learning rates, betas and epsilon stay as this run configures them.
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
    with _own_settings(optimizer):
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


@contextlib.contextmanager
def _own_settings(optimizer: Any) -> Iterator[None]:
    """Keep what this run configures; loading brings the settings of the saved run along."""
    groups = [] if optimizer is None else optimizer.param_groups
    own = [{name: group[name] for name in SETTINGS if name in group} for group in groups]
    yield
    for number, settings in enumerate(own):
        optimizer.param_groups[number].update(settings)


def _load_rng(path: Path) -> None:
    try:
        restore_rng(torch.load(path, map_location="cpu", weights_only=True))
    except (*DAMAGE, OSError) as error:
        raise CheckpointError(f"{path} is refused or damaged: {reason(error)}") from None
