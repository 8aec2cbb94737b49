"""A model's and an optimizer's tensors in Megatron's distributed checkpoint format, `torch_dist`.

The optimizer is kept parameter by parameter ("fully reshardable"), so that tensor, pipeline and
data parallelism may all change in between.

Megatron-Core writes in forked processes and waits until each has reported. One that is killed (by
the kernel when memory runs out, for example) never does, so `watched_writers` handles SIGCHLD and
raises in the main thread, out of that wait.

In the background, a forked process carries out Megatron's request of an asynchronous save (0.16.1
and 0.19.2, dist_checkpointing/strategies/async_utils.py). Forking makes the snapshot: the child
sees the memory as it was at that moment. Tensors on a GPU are copied to the host first, and so are
pinned ones, whose pages a device may write. The child takes part in no collective and collects no
garbage: freeing a CUDA object without a CUDA context hangs or fails. It reports through a pipe,
which closes when the child and everything that it started have ended.
"""

from __future__ import annotations

import contextlib
import inspect
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from types import FrameType
from typing import Any

import psutil
import torch

from megatron_sr1.checkpoint.disk import Measure, check_space, measure, needed_bytes, write_failure
from megatron_sr1.checkpoint.mapping import TOWER, Entry
from megatron_sr1.checkpoint.megatron_optimizer import ensure_state, named_by_kind
from megatron_sr1.errors import CheckpointError
from megatron_sr1.runtime import cpu
from megatron_sr1.runtime.groups import (
    Group,
    Groups,
    agree,
    gather_objects,
    on_all_ranks,
    on_writer,
    reason,
)
from megatron_sr1.runtime.host_memory import no_collection
from megatron_sr1.runtime.signals import end_with

METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    # Gathered over gloo in host memory, on one data-parallel rank only.
    "distrib_optim_fully_reshardable_mem_efficient": True,
    "chained_optim_avoid_prefix": True,
}
# Transformer Engine's extra state is a pickle; FP8 scales are computed again after a resume.
EXTRA = "_extra_state"


@dataclass(frozen=True)
class Trained:
    """What a checkpoint holds of a run besides its JSON state.

    The model has one chunk per virtual stage, wrapped for training or not. An optimizer of None
    saves or loads the model alone; `scheduler` is its learning-rate schedule, or None.
    """

    chunks: Sequence[Any]
    optimizer: Any
    scheduler: Any
    groups: Groups

    @property
    def layout(self) -> dict[str, int]:
        """Ranks per dimension; saved generators belong to one layout."""
        names = ("tensor", "pipeline", "context", "data")
        return {name: getattr(self.groups, name).size for name in names}


def unwrap(chunk: Any) -> Any:
    """Take a model out of Megatron's data-parallel and mixed-precision wrappers."""
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk


def sharing(entry: Entry, groups: Groups) -> Group:
    """Return the ranks that a parameter is split over."""
    return groups.tower if entry.name.startswith(TOWER) else groups.tensor


def sharded_state(chunks: Sequence[Any], optimizer: Any, *, is_loading: bool) -> dict[str, Any]:
    """Return Megatron's description of which part of which tensor this rank holds.

    Of a model with adapters these are its adapters.
    """
    state: dict[str, Any] = {}
    for number, chunk in enumerate(chunks):
        model = unwrap(chunk)
        if model.adapters is not None:
            state[chunk_key(number, len(chunks))] = _sharded_adapters(model)
            continue
        sharded = model.sharded_state_dict(prefix="", metadata=dict(METADATA))
        kept = {key: value for key, value in sharded.items() if not key.endswith(EXTRA)}
        state[chunk_key(number, len(chunks))] = kept
    if optimizer is not None:
        described = optimizer.sharded_state_dict(
            dict(state), is_loading=is_loading, metadata=dict(METADATA)
        )
        state["optimizer"] = named_by_kind(optimizer, described)
    return state


def _sharded_adapters(model: Any) -> dict[str, Any]:
    """Describe the adapters of a chunk, under the names of their entries."""
    from megatron.core.dist_checkpointing import ShardedTensor

    from megatron_sr1.model.adapters import LowRank

    groups: Groups = model.groups
    found = {}
    for path, part in model.named_modules():
        if isinstance(part, LowRank):
            named = zip(part.named_parameters(), part.entries, strict=True)
            for (name, parameter), entry in named:
                group, dim = sharing(entry, groups), entry.shard_dim
                split = [] if dim is None else [(dim, group.rank, group.size)]
                # Ranks with the same values, of which the first writes.
                copy = groups.tensor.rank if dim is None or group.size == 1 else 0
                found[f"{path}.{name}"] = ShardedTensor.from_rank_offsets(
                    entry.name,
                    parameter,
                    *split,
                    replica_id=(0, copy, groups.data_context.rank),
                )
    return found


def chunk_key(number: int, num_chunks: int) -> str:
    """Return Megatron's name of a chunk in a state dict."""
    return "model" if num_chunks == 1 else f"model{number}"


def save_tensors(folder: Path, trained: Trained, in_background: bool) -> PendingTensors:
    """Write model and optimizer into an empty directory; collective over all ranks.

    In the background a process of each rank writes the tensors as they are now. Torch's own
    `async_save` does not know Megatron's sharded tensors; Megatron's queue of calls, no manifest.

    Raises `CheckpointError` if the disk is full or a writing process died. On all ranks, unless it
    is in files that rank 0 writes within Megatron: then on rank 0, whose exit ends the others.
    """
    from megatron.core.dist_checkpointing import save

    groups = trained.groups
    with cpu.megatron_mode():
        ensure_state(trained.optimizer)
        state = sharded_state(trained.chunks, trained.optimizer, is_loading=False)
        needed = sum(on_all_ranks(groups, lambda: needed_bytes(state)))
        on_writer(groups, lambda: check_space(folder, needed))
        with _explained(folder, needed, groups):
            if in_background:
                # The newer release has a second strategy, in a package of its own.
                newer = "async_strategy" in inspect.signature(save).parameters
                way: dict[str, Any] = {"async_strategy": "mcore"} if newer else {}
                request = save(state, str(folder), async_sharded_save=True, **way)
                return PendingTensors(folder, needed, groups, request)
            with watched_writers():
                save(state, str(folder))
    return PendingTensors(folder, needed, groups, None)


class PendingTensors:
    """Tensors that a process of each rank is writing; `needed` bytes in all, for messages."""

    def __init__(self, folder: Path, needed: int, groups: Groups, request: Any) -> None:
        """Take the snapshot and start the process; without a request all is written already."""
        self._folder, self._needed, self._groups = folder, needed, groups
        self._finalizers = request.finalize_fns if request else []
        self._process: Any = None
        if request is None or request.async_fn is None:
            return
        rank, _, self._queue = request.async_fn_args
        buckets = [
            (path, key, (others, [(i, t.clone() if t.is_pinned() else t) for i, t in tensors]))
            for path, key, (others, tensors) in request.preload_fn()
        ]
        fork = multiprocessing.get_context("fork")
        self._reports, reports = fork.Pipe(duplex=False)
        self._process = fork.Process(
            target=_write, args=(os.getpid(), reports, request.async_fn, rank, buckets)
        )
        with no_collection():  # in the child there is none until its end
            self._process.start()
        reports.close()  # so that the pipe closes with the child's end

    @property
    def is_done(self) -> bool:
        """True if this rank's process has written everything, has failed or has died."""
        return self._process is None or bool(self._reports.poll())

    def finish(self) -> dict[str, Measure]:
        """Wait for all ranks' processes and write the tensors' metadata; collective.

        Returns this rank's files, which are on the disk, by name. Raises `CheckpointError` on all
        ranks if one of the processes could not write or died.
        """
        with cpu.megatron_mode(), _explained(self._folder, self._needed, self._groups):
            measures = on_all_ranks(self._groups, self._collect)[self._groups.world.rank]
            for finalize in self._finalizers:
                finalize()
        return dict(measures)

    def _collect(self) -> dict[str, Measure]:
        if self._process is None:
            return {}
        try:
            results, measures, problem = self._reports.recv()
            self._process.join()
        except EOFError:
            self._process.join()
            problem = _ending(self._process.pid, self._process.exitcode)
        if problem is not None:
            raise CheckpointError(write_failure(self._folder, self._needed, problem))
        self._queue.put(results)
        return dict(measures)


def _write(
    parent: int, reports: Connection, function: Callable[..., None], rank: int, buckets: list[Any]
) -> None:
    """In the child: write the files, measure them, report."""
    end_with(parent)
    torch.set_num_threads(1)  # the threads of the parent's pool are not here
    queue: SimpleQueue[Any] = SimpleQueue()  # the parent's own queue is filled in `_collect`
    try:
        with watched_writers():
            function(rank, buckets, queue)
        results = queue.get_nowait()
        if isinstance(results, Exception):
            raise results
        measures = {Path(path).name: measure(Path(path)) for path, _, _ in buckets}
        reports.send((results, measures, None))
    except Exception as error:  # reported to the parent, which raises it on all ranks
        reports.send((None, {}, reason(error)))
    reports.close()


@contextlib.contextmanager
def watched_writers() -> Iterator[None]:
    """Raise `CheckpointError` as soon as a child process that was started inside fails."""
    before = {child.pid for child in psutil.Process().children()}

    def look(number: int, frame: FrameType | None) -> None:
        for child in psutil.Process().children():
            code = 0 if child.pid in before else _exit_code(child.pid)
            if code:
                raise CheckpointError(_ending(child.pid, code))

    former = signal.signal(signal.SIGCHLD, look)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, former)


def _exit_code(pid: int) -> int:
    """Return a child's exit code, negative for a signal, 0 while it runs; it is not reaped."""
    with contextlib.suppress(ChildProcessError):
        end = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if end is not None:
            return end.si_status if end.si_code == os.CLD_EXITED else -end.si_status
    return 0


def _ending(pid: int, code: int) -> str:
    how = f"was ended by signal {-code} (memory may have run out)"
    return f"process {pid}, which wrote tensors, {how if code < 0 else f'left with status {code}'}"


@contextlib.contextmanager
def _explained(folder: Path, needed: int, groups: Groups) -> Iterator[None]:
    """Turn errors of Megatron's writing into `CheckpointError`s that name the cause."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except CheckpointException as error:  # torch raises it on all ranks, the cause on one
        cause = write_failure(folder, needed, reason(error)) if error.failures else None
        agree(gather_objects(cause, groups.world))
        raise
    except (OSError, RuntimeError) as error:
        raise CheckpointError(write_failure(folder, needed, reason(error))) from error
