"""Load the Megatron distributed checkpoints of a run, under the same layout or another.

saving.py writes `DIR/step_N/` with

    .metadata, common.pt, *.distcp   model and optimizer (megatron.core.dist_checkpointing)
    rng_R.pt                         generators of rank R
    state.json                       step, layout, schedule, and what the caller keeps
    hf_files/                        configuration, tokenizer and weight headers of the published
                                     model, so that the directory is a model by itself
    manifest.json                    size and digest of all these files

and `DIR/latest`, a text file that names the checkpoint to resume from. A checkpoint gets its name
when all of it is on the disk; `latest` is replaced after that, and older checkpoints are removed
last. Files are compared with the manifest before they are read; checkpoints of older releases have
none, which is logged.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_sr1.checkpoint import folders
from megatron_sr1.checkpoint.disk import MANIFEST, listed, problems_of
from megatron_sr1.checkpoint.folders import LATEST, STATE, ModelSource
from megatron_sr1.checkpoint.hf import load_hf
from megatron_sr1.checkpoint.mapping import OUTPUT
from megatron_sr1.checkpoint.megatron_optimizer import check_kind, fill_step
from megatron_sr1.checkpoint.tensors import EXTRA, Trained, chunk_key, sharded_state, unwrap
from megatron_sr1.checkpoint.untrusted import COMMON_OBJECT, DAMAGE, check_folder
from megatron_sr1.errors import CheckpointError
from megatron_sr1.model.hf_config import HFConfig, read_hf_config
from megatron_sr1.runtime import cpu
from megatron_sr1.runtime.groups import Groups, on_all_ranks, reason
from megatron_sr1.runtime.rng import restore_rng

log = logging.getLogger(__name__)
SETTINGS = ("max_lr", "min_lr", "betas", "eps")


def load_checkpoint(directory: str | Path, trained: Trained, verify: bool = True) -> dict[str, Any]:
    """Fill what is trained from a run's latest checkpoint, of any layout; collective.

    Of the schedule the position is loaded, while learning rates, betas and epsilon stay as this run
    configures them. Generators are restored only under the layout that they were saved under. With
    `verify`, the files' digests are compared, not only their sizes. Returns the saved JSON state.

    Raises `CheckpointError` if there is none, it is damaged, or it is of another model. Of damaged
    files it names the first few, and the complete checkpoints in the directory.
    """
    step = folders.latest_step(directory)
    if step is None:
        raise CheckpointError(
            f"{directory}: no checkpoint; looked for {LATEST} and step_N directories"
        )
    folder = Path(directory) / f"step_{step}"
    record = folders.read_state(folder)
    if record["step"] != step:
        raise CheckpointError(f"{folder / STATE}: it is the state of step_{record['step']}")
    verify_folder(folder, trained.groups, verify)
    groups = [] if trained.optimizer is None else trained.optimizer.param_groups
    own = [{name: group[name] for name in SETTINGS if name in group} for group in groups]
    load_tensors(folder, trained.chunks, trained.optimizer)
    for number, settings in enumerate(own):  # loading replaced the groups by those of the saved run
        trained.optimizer.param_groups[number].update(settings)
    if trained.scheduler is not None and record["scheduler"] is not None:
        try:
            trained.scheduler.load_state_dict(record["scheduler"])
        except (KeyError, TypeError, ValueError, AssertionError) as error:
            raise CheckpointError(f"{folder / STATE}: no schedule: {reason(error)}") from None
    if record["layout"] == trained.layout:
        path = folder / f"rng_{trained.groups.world.rank}.pt"
        try:
            restore_rng(torch.load(path, map_location="cpu", weights_only=True))
        except (*DAMAGE, OSError) as error:
            raise CheckpointError(f"{path} is refused or damaged: {reason(error)}") from None
    else:
        log.info("%s: saved under %s, resumed under another layout", folder, record["layout"])
    return dict(record["state"])


def load_model(
    chunks: Sequence[Any], source: ModelSource, hf_config: HFConfig, groups: Groups, verify: bool
) -> None:
    """Fill the chunks from a model directory of either kind; collective over all ranks.

    With `verify`, the digests of a Megatron checkpoint are compared, not only the sizes. Raises
    `CheckpointError` if the weights are damaged or not those of the model.
    """
    if source.kind == "huggingface":
        load_hf(chunks, source.weights, hf_config, groups)
    else:
        verify_source(source, groups, verify)
        load_tensors(source.weights, chunks, None)


def load_tensors(folder: Path, chunks: Sequence[Any], optimizer: Any) -> None:
    """Fill the model, and the optimizer unless None, from a checkpoint of any layout; collective.

    Raises `CheckpointError` if it is damaged, not to be trusted, or of another model.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.core import CheckpointingException
    from megatron.core.dist_checkpointing.strategies import common
    from torch.distributed.checkpoint.api import CheckpointException

    stored = check_folder(folder).state_dict_metadata
    if COMMON_OBJECT in stored and hasattr(common, "TorchCommonLoadStrategy"):
        raise CheckpointError(f"{folder}: written by a newer Megatron-Core; install that one")
    check_kind(folder, stored, optimizer)
    with cpu.megatron_mode(), fill_step(optimizer):
        state = sharded_state(chunks, optimizer, is_loading=True)
        try:
            loaded = dist_checkpointing.load(state, str(folder))
        except (CheckpointingException, CheckpointException, RuntimeError, KeyError) as error:
            raise CheckpointError(
                f"{folder}: {reason(error)}; expected a checkpoint of this model"
            ) from error
        for number, chunk in enumerate(chunks):
            part = loaded[chunk_key(number, len(chunks))]
            model = unwrap(chunk)
            missing, unexpected = model.load_state_dict(part, strict=False)
            is_whole = model.adapters is None  # otherwise the base is there already
            left = [name for name in missing if is_whole and not name.endswith(EXTRA)]
            assert not left and not unexpected, f"missing {left}, unexpected {unexpected}"
        if optimizer is not None:
            optimizer.load_state_dict(loaded["optimizer"])


def verify_source(source: ModelSource, groups: Groups, digests: bool) -> None:
    """Compare a model's checkpoint with its manifest as `verify_folder` does; collective.

    Raises `CheckpointError` also if an output layer of its own would be replaced by the embedding.
    """
    verify_folder(source.weights, groups, digests)
    config = read_hf_config(source.hf_files)
    if config.tie_word_embeddings and OUTPUT in check_folder(source.weights).state_dict_metadata:
        raise CheckpointError(
            f"{source.weights} holds an output layer of its own, but {source.hf_files}/config.json "
            "has tie_word_embeddings=true; set it to false in every place"
        )


def verify_folder(folder: Path, groups: Groups, digests: bool) -> None:
    """Compare a checkpoint with its manifest, each rank a part; collective over all ranks.

    Without `digests`, only names and sizes are compared. Raises `CheckpointError` on all ranks if a
    file is not as it was saved, or the manifest is missing where saving wrote one.
    """
    rank, size = groups.world.rank, groups.world.size
    saved_with = folders.read_state(folder)["format"] if (folder / STATE).is_file() else 0
    if not (folder / MANIFEST).exists():
        if saved_with >= folders.WITH_MANIFEST:
            raise CheckpointError(f"{folder / MANIFEST}: missing; {folders.other_steps(folder)}")
        if rank == 0:
            text = "%s has no %s: it was saved before checksums were kept; damage is not noticed"
            log.warning(text, folder, MANIFEST)
        return
    parts = on_all_ranks(groups, lambda: problems_of(folder, digests, rank, size))
    found = sorted(problem for part in parts for problem in part)
    if found:
        found_text, advice = listed(found), folders.other_steps(folder)
        raise CheckpointError(f"{folder}: not as it was saved ({MANIFEST}): {found_text}; {advice}")
