"""Load the Megatron distributed checkpoints of a run, under the same layout or another.

In: a directory of checkpoints. Out: model, optimizer and schedule filled, and a JSON state.
saving.py writes `DIR/step_N/` with

    .metadata, common.pt, *.distcp   model and optimizer (megatron.core.dist_checkpointing)
    rng_R.pt                         generators of rank R
    state.json                       step, layout, schedule, and what the caller keeps
    hf_files/                        configuration, tokenizer and weight headers of the published
                                     model, so that the folder is a model by itself
    manifest.json                    size and digest of all these files

and `DIR/latest`, a text file that names the checkpoint to resume from. A checkpoint gets its name
when all of it is on the disk; `latest` is replaced after that, and older checkpoints are removed
last. Files are compared with the manifest before they are read; checkpoints of older releases have
none, which is logged.
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
    ModelSource,
    latest_step,
    other_steps,
)
from megatron_sr1.checkpoint.hf import load_hf
from megatron_sr1.checkpoint.manifest import MANIFEST, extra_files, problem_of, read_manifest
from megatron_sr1.checkpoint.mapping import OUTPUT
from megatron_sr1.checkpoint.state import WITH_MANIFEST, layout_of, read_state
from megatron_sr1.checkpoint.tensors import Trained, load_tensors
from megatron_sr1.checkpoint.untrusted import DAMAGE, check_folder
from megatron_sr1.errors import CheckpointError
from megatron_sr1.model.hf_config import HFConfig, read_hf_config
from megatron_sr1.runtime.collectives import on_all_ranks, reason
from megatron_sr1.runtime.groups import Groups
from megatron_sr1.runtime.rng import restore_rng

log = logging.getLogger(__name__)
SETTINGS = ("max_lr", "min_lr", "betas", "eps")
NUM_NAMED = 6  # files that an error names


def load_checkpoint(
    directory: str | Path, trained: Trained, step: int | None = None, verify: bool = True
) -> dict[str, Any]:
    """Continue from a checkpoint, under the same layout or another; collective over all ranks.

    Args:
        directory: checkpoints of the run.
        trained: is filled. Of the schedule its position is loaded, while learning rates, betas and
            epsilon stay as this run configures them.
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
    optimizer, scheduler, groups = trained.optimizer, trained.scheduler, trained.groups
    verify_folder(folder, groups, verify, record["format"])
    with _own_settings(optimizer):
        load_tensors(folder, trained.chunks, optimizer)
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


def check_files(folder: Path, groups: Groups, *, digests: bool, advice: str) -> None:
    """Compare a folder with its manifest; collective over all ranks.

    Args:
        folder: with a manifest.
        groups: the layout; its ranks share the reading.
        digests: False compares names and sizes only.
        advice: what to do, for the message.

    Raises:
        CheckpointError: on all ranks the same, naming files, what was expected and what came.
    """
    rank, size = groups.world.rank, groups.world.size

    def look() -> list[str]:
        files = read_manifest(folder)
        by_size = sorted(files, key=lambda name: (-files[name].num_bytes, name))
        problems = [problem_of(folder, n, files[n], digests) for n in by_size[rank::size]]
        if rank == 0:
            problems += extra_files(folder, files)
        return [problem for problem in problems if problem]

    problems = sorted(problem for part in on_all_ranks(groups, look) for problem in part)
    if problems:
        more = f"; {len(problems) - NUM_NAMED} more" if len(problems) > NUM_NAMED else ""
        raise CheckpointError(
            f"{folder}: not as it was saved ({MANIFEST}): {'; '.join(problems[:NUM_NAMED])}{more}; "
            f"{advice}"
        )


def verify_folder(folder: Path, groups: Groups, digests: bool, saved_with: int) -> None:
    """Compare a checkpoint with its manifest; collective over all ranks.

    Args:
        folder: of the checkpoint.
        groups: the layout.
        digests: False compares names and sizes only.
        saved_with: format of its state; 0 where it has none.

    Raises:
        CheckpointError: on all ranks: a file is not as it was saved, or the manifest is missing
            where saving wrote one.
    """
    if (folder / MANIFEST).exists():
        check_files(folder, groups, digests=digests, advice=other_steps(folder))
    elif saved_with >= WITH_MANIFEST:
        raise CheckpointError(f"{folder / MANIFEST}: missing; {other_steps(folder)}")
    elif groups.world.rank == 0:
        log.warning(
            "%s has no %s: it was saved before checksums were kept, so damage to it goes unnoticed",
            *(folder, MANIFEST),
        )


def load_model(
    chunks: Sequence[Any],
    source: ModelSource,
    hf_config: HFConfig,
    groups: Groups,
    verify: bool = True,
) -> None:
    """Fill the chunks from a model directory of either kind; collective over all ranks.

    Args:
        chunks: the model, one chunk a virtual stage.
        source: the directory.
        hf_config: shape of the model.
        groups: the layout.
        verify: compare the digests of a Megatron checkpoint, not only the sizes.

    Raises:
        CheckpointError: the weights are not those of the model, or damaged.
    """
    if source.kind == "huggingface":
        load_hf(chunks, source.weights, hf_config, groups)
    else:
        verify_source(source, groups, verify)
        load_tensors(source.weights, chunks, None)


def verify_source(source: ModelSource, groups: Groups, digests: bool) -> None:
    """Compare a Megatron checkpoint with its manifest; collective over all ranks.

    Raises:
        CheckpointError: on all ranks: a file is not as it was saved, or the checkpoint has an
            output layer that its configuration would have replaced by the embedding.
    """
    has_state = (source.weights / STATE).is_file()
    saved_with = read_state(source.weights)["format"] if has_state else 0
    verify_folder(source.weights, groups, digests, saved_with)
    config = read_hf_config(source.hf_files)
    if config.tie_word_embeddings and OUTPUT in check_folder(source.weights).state_dict_metadata:
        raise CheckpointError(
            f"{source.weights} holds an output layer of its own, but {source.hf_files}/config.json "
            "has tie_word_embeddings=true; set it to false in every place"
        )
