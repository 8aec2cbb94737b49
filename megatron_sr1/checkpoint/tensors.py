"""A model's and an optimizer's tensors in Megatron's distributed checkpoint format.

In: chunks and optimizer under any layout, and a folder. Out: the folder's `torch_dist` files, or
the tensors filled from them. The optimizer is kept parameter by parameter ("fully reshardable"),
so that tensor, pipeline and data parallelism may all change in between.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sr1.checkpoint import megatron_optimizer
from megatron_sr1.checkpoint.disk import (
    Measure,
    check_room,
    needed_bytes,
    room_text,
    why_not_written,
)
from megatron_sr1.checkpoint.megatron_optimizer import check_kind, named_by_kind
from megatron_sr1.checkpoint.untrusted import COMMON_OBJECT, check_folder
from megatron_sr1.checkpoint.writers import BackgroundWriter, watched_writers
from megatron_sr1.errors import CheckpointError
from megatron_sr1.runtime import cpu
from megatron_sr1.runtime.collectives import (
    agree,
    gather_objects,
    on_all_ranks,
    on_writer,
    reason,
)
from megatron_sr1.runtime.groups import Groups

METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    # Gathered over gloo in host memory, on one data-parallel rank only.
    "distrib_optim_fully_reshardable_mem_efficient": True,
    "chained_optim_avoid_prefix": True,
}
# Transformer Engine's extra state is a pickle; FP8 scales are found anew after a resume.
EXTRA = "_extra_state"


@dataclass(frozen=True)
class Trained:
    """What a checkpoint holds of a run beside its JSON state.

    Attributes:
        chunks: the model, one chunk per virtual stage, wrapped for training or not.
        optimizer: Megatron's optimizer; None to save or load the model alone.
        scheduler: its learning-rate schedule, or None.
        groups: process groups of the layout.
    """

    chunks: Sequence[Any]
    optimizer: Any
    scheduler: Any
    groups: Groups


def save_tensors(folder: Path, trained: Trained) -> None:
    """Write model and optimizer into an empty directory; collective over all ranks.

    Raises:
        CheckpointError: the disk is full or a writing process ended. On all ranks, unless it is in
            files that rank 0 writes within Megatron: then on rank 0, whose end ends the others.
    """
    from megatron.core import dist_checkpointing

    with cpu.megatron_mode():
        state, needed = _described(folder, trained)
        with _told(folder, needed, trained.groups), watched_writers():
            dist_checkpointing.save(state, str(folder))


def begin_tensors(folder: Path, trained: Trained) -> PendingTensors:
    """`save_tensors`, with the writing left to a process of each rank; collective over all ranks.

    What is written is what the tensors hold now. Torch's own `async_save` does not know Megatron's
    sharded tensors; Megatron's queue of calls is not used, as it knows no manifest.
    """
    from megatron.core import dist_checkpointing

    # The newer release has another way besides, in a package of its own.
    newer = "async_strategy" in inspect.signature(dist_checkpointing.save).parameters
    way: dict[str, Any] = {"async_strategy": "mcore"} if newer else {}
    with cpu.megatron_mode():
        state, needed = _described(folder, trained)
        with _told(folder, needed, trained.groups):
            request = dist_checkpointing.save(state, str(folder), async_sharded_save=True, **way)
            return PendingTensors(folder, needed, trained.groups, request)


class PendingTensors:
    """Tensors that processes are writing."""

    def __init__(self, folder: Path, needed: int, groups: Groups, request: Any) -> None:
        """Start this rank's process."""
        self._folder, self._needed, self._groups = folder, needed, groups
        self._completing = request.finalize_fns
        self._writer = BackgroundWriter(request)

    @property
    def is_done(self) -> bool:
        """Whether this rank's process has come to an end, good or bad."""
        return self._writer.is_done

    def finish(self) -> dict[str, Measure]:
        """Wait for all ranks' processes and write what lists their tensors; collective.

        Returns:
            this rank's files, which are on the disk.

        Raises:
            CheckpointError: on all ranks, if one of the processes could not write or was ended.
        """
        with cpu.megatron_mode(), _told(self._folder, self._needed, self._groups):
            measures = on_all_ranks(self._groups, self._written)[self._groups.world.rank]
            for complete in self._completing:
                complete()
        return dict(measures)

    def _written(self) -> dict[str, Measure]:
        try:
            return self._writer.finish()
        except CheckpointError as error:
            raise CheckpointError(_cause(error, self._folder, self._needed)) from error


def _described(folder: Path, trained: Trained) -> tuple[dict[str, Any], int]:
    """Return what to save, and the bytes that all ranks need for it, which are free; collective."""
    megatron_optimizer.ensure_state(trained.optimizer)
    state = _sharded_state(trained.chunks, trained.optimizer, is_loading=False)
    needed = sum(on_all_ranks(trained.groups, lambda: needed_bytes(state)))
    on_writer(trained.groups, lambda: check_room(folder, needed))
    return state, needed


@contextlib.contextmanager
def _told(folder: Path, needed: int, groups: Groups) -> Iterator[None]:
    """Around Megatron's writing: its errors in our words."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
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
    with cpu.megatron_mode(), megatron_optimizer.loading(optimizer):
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
