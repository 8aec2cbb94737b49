"""A model's and an optimizer's tensors in Megatron's distributed checkpoint format.

In: chunks and optimizer under any layout, and a folder. Out: the folder's `torch_dist` files, or
the tensors filled from them. The optimizer is kept parameter by parameter ("fully reshardable"),
so that tensor, pipeline and data parallelism may all change in between.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_sr1.checkpoint import torch_adam
from megatron_sr1.checkpoint.optimizer_state import check_kind, named_by_kind
from megatron_sr1.checkpoint.space import check_room, needed_bytes, room_text, why_not_written
from megatron_sr1.checkpoint.together import agree, on_writer, reason, together
from megatron_sr1.checkpoint.untrusted import COMMON_OBJECT, check_folder
from megatron_sr1.checkpoint.writers import watched_writers
from megatron_sr1.errors import CheckpointError
from megatron_sr1.runtime import cpu
from megatron_sr1.runtime.groups import Groups, gather_objects

METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    # Gathered over gloo in host memory, on one data-parallel rank only.
    "distrib_optim_fully_reshardable_mem_efficient": True,
    "chained_optim_avoid_prefix": True,
}
# Transformer Engine's extra state is a pickle; FP8 scales are found anew after a resume.
EXTRA = "_extra_state"


def save_tensors(folder: Path, chunks: Sequence[Any], optimizer: Any, groups: Groups) -> None:
    """Write model and optimizer into an empty folder; collective over all ranks.

    Args:
        folder: there already, seen by all ranks.
        chunks: the model, wrapped for training or not.
        optimizer: Megatron's optimizer, or None.
        groups: the layout.

    Raises:
        CheckpointError: the disk is full or a writing process ended. On all ranks, unless it is in
            files that rank 0 writes within Megatron: then on rank 0, whose end ends the others.
    """
    from megatron.core import dist_checkpointing
    from torch.distributed.checkpoint.api import CheckpointException

    with cpu.megatron_mode():
        torch_adam.ensure_state(optimizer)
        state = _sharded_state(chunks, optimizer, is_loading=False)
        needed = sum(together(groups, lambda: needed_bytes(state)))
        on_writer(groups, lambda: check_room(folder, needed))
        try:
            with watched_writers():
                dist_checkpointing.save(state, str(folder))
        except CheckpointException as error:  # torch raises it on all ranks, the cause on one
            cause = _cause(error, folder, needed) if error.failures else None
            agree(gather_objects(cause, groups.world))
            raise
        except (OSError, RuntimeError) as error:
            raise CheckpointError(_cause(error, folder, needed)) from error


def _cause(error: BaseException, folder: Path, needed: int) -> str:
    """Why tensors could not be written, with the room that they need."""
    return f"{why_not_written(folder)}{reason(error)} ({room_text(folder, needed)})"


def load_tensors(folder: Path, chunks: Sequence[Any], optimizer: Any) -> None:
    """Fill model and optimizer from a folder; collective over all ranks.

    Args:
        folder: as `save_tensors` wrote it, under any layout.
        chunks: the model, wrapped for training or not.
        optimizer: Megatron's optimizer, or None to load the model alone.

    Raises:
        CheckpointError: the folder is damaged, not to be trusted, or of another model.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.core import CheckpointingException
    from megatron.core.dist_checkpointing.strategies import common
    from torch.distributed.checkpoint.api import CheckpointException

    kept = check_folder(folder).state_dict_metadata
    if COMMON_OBJECT in kept and hasattr(common, "TorchCommonLoadStrategy"):
        raise CheckpointError(f"{folder}: written by a newer Megatron-Core; install that one")
    check_kind(folder, kept, optimizer)
    with cpu.megatron_mode(), torch_adam.loading(optimizer):
        state = _sharded_state(chunks, optimizer, is_loading=True)
        try:
            loaded = dist_checkpointing.load(state, str(folder))
        except (CheckpointingException, CheckpointException, RuntimeError, KeyError) as error:
            raise CheckpointError(
                f"{folder}: {reason(error)}; expected a checkpoint of the model at hand"
            ) from error
        for number, chunk in enumerate(chunks):
            part = loaded[_key(number, len(chunks))]
            missing, unexpected = unwrap(chunk).load_state_dict(part, strict=False)
            left = [name for name in missing if not name.endswith(EXTRA)]
            assert not left and not unexpected, f"missing {left}, unexpected {unexpected}"
        if optimizer is not None:
            optimizer.load_state_dict(loaded["optimizer"])


def unwrap(chunk: Any) -> Any:
    """The model itself, out of Megatron's data-parallel and mixed-precision wrappers."""
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk


def _sharded_state(chunks: Sequence[Any], optimizer: Any, *, is_loading: bool) -> dict[str, Any]:
    """Megatron's description of what is where, of model and optimizer."""
    state: dict[str, Any] = {}
    for number, chunk in enumerate(chunks):
        sharded = unwrap(chunk).sharded_state_dict(prefix="", metadata=dict(METADATA))
        kept = {key: value for key, value in sharded.items() if not key.endswith(EXTRA)}
        state[_key(number, len(chunks))] = kept
    if optimizer is not None:
        described = optimizer.sharded_state_dict(
            dict(state), is_loading=is_loading, metadata=dict(METADATA)
        )
        state["optimizer"] = named_by_kind(optimizer, described)
    return state


def _key(number: int, num_chunks: int) -> str:
    """Megatron's name of a chunk in a state dict."""
    return "model" if num_chunks == 1 else f"model{number}"
