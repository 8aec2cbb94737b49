"""A process that writes this rank's tensors while training goes on.

In: Megatron's request of an asynchronous save (0.16.1 and 0.19.2, dist_checkpointing/strategies/
async_utils.py). Out: the files, their sizes and digests, or why not.

Forking makes the snapshot: the child sees the memory as it was at that moment. Tensors on a GPU are
copied to the host first, and so are pinned ones, whose pages a device may write. The child takes no
part in any collective. It tells by a pipe, whose end is its own end and that of what it started.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch

from megatron_sr1.checkpoint.files import Measure, measure
from megatron_sr1.checkpoint.together import reason
from megatron_sr1.checkpoint.writers import watched_writers
from megatron_sr1.errors import CheckpointError
from megatron_sr1.runtime.orphans import end_with


class BackgroundWriter:
    """Writes the tensors of one save; begins at once.

    Args:
        request: Megatron's. On the way back its queue is given what the child found.
    """

    def __init__(self, request: Any) -> None:
        """Take the snapshot and start the process, if this rank has something to write."""
        self._process: Any = None
        if request.async_fn is None:
            return
        rank, _, self._queue = request.async_fn_args
        buckets = _unpinned(request.preload_fn())
        fork = multiprocessing.get_context("fork")
        self._told, telling = fork.Pipe(duplex=False)
        self._process = fork.Process(
            target=_write, args=(os.getpid(), telling, request.async_fn, rank, buckets)
        )
        self._process.start()
        telling.close()  # so that the child's end is the pipe's

    @property
    def is_done(self) -> bool:
        """Whether `finish` need not wait: all is written, or the process has failed or ended."""
        return self._process is None or bool(self._told.poll())

    def finish(self) -> dict[str, Measure]:
        """Wait for the process.

        Returns:
            the files of this rank, brought to the disk, by their names in the folder.

        Raises:
            CheckpointError: it could not write, or was ended.
        """
        if self._process is None:
            return {}
        try:
            results, measures, problem = self._told.recv()
        except EOFError:
            self._process.join()
            code = self._process.exitcode
            how = (
                f"was ended by signal {-code} (memory may have run out)"
                if code < 0
                else (f"left with status {code}")
            )
            raise CheckpointError(
                f"process {self._process.pid}, which wrote tensors, {how}"
            ) from None
        self._process.join()
        if problem is not None:
            raise CheckpointError(problem)
        self._queue.put(results)
        return dict(measures)


def _unpinned(buckets: list[Any]) -> list[Any]:
    return [
        (path, key, (others, [(i, t.clone() if t.is_pinned() else t) for i, t in tensors]))
        for path, key, (others, tensors) in buckets
    ]


def _write(
    parent: int, telling: Connection, function: Callable[..., None], rank: int, buckets: list[Any]
) -> None:
    """The child: write, measure, tell."""
    end_with(parent)
    torch.set_num_threads(1)  # the threads of the parent's pool are not here
    given: SimpleQueue[Any] = SimpleQueue()  # Megatron's in the parent gets it in `finish`
    results, measures, problem = None, {}, None
    try:
        with watched_writers():
            function(rank, buckets, given)
        results = given.get_nowait()
        if isinstance(results, Exception):
            raise results
        paths = [Path(path) for path, _, _ in buckets]
        measures = {path.name: measure(path) for path in paths}
    except Exception as error:  # told to the parent, which raises it on all ranks
        problem = reason(error)
    telling.send((None if problem else results, measures, problem))
    telling.close()
