"""The processes that write a checkpoint's tensors: watched, or left to write in the background.

Megatron-Core writes tensors in forked processes and waits until each has reported. One that is
killed (by the kernel when memory runs out, for example) never does, so `watched_writers` handles
SIGCHLD and raises in the main thread, out of that wait.

`BackgroundWriter` takes Megatron's request of an asynchronous save (0.16.1 and 0.19.2,
dist_checkpointing/strategies/async_utils.py) and gives the files with their sizes and digests.
Forking makes the snapshot: the child sees the memory as it was at that moment. Tensors on a GPU are
copied to the host first, and so are pinned ones, whose pages a device may write. The child takes
part in no collective. It reports through a pipe, which closes when the child and everything that it
started have ended.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from types import FrameType
from typing import Any

import psutil
import torch

from megatron_sr1.checkpoint.disk import Measure, measure
from megatron_sr1.errors import CheckpointError
from megatron_sr1.runtime.collectives import reason
from megatron_sr1.runtime.signals import end_with


@contextlib.contextmanager
def watched_writers() -> Iterator[None]:
    """While inside, a child process that began inside and ends badly raises `CheckpointError`.

    Only Python's main thread can be interrupted; in another one this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {child.pid for child in psutil.Process().children()}

    def look(number: int, frame: FrameType | None) -> None:
        for child in psutil.Process().children():
            how = None if child.pid in before else _bad_end(child.pid)
            if how is not None:
                raise CheckpointError(f"process {child.pid}, which wrote tensors, {how}")

    former = signal.signal(signal.SIGCHLD, look)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, former)


def _bad_end(pid: int) -> str | None:
    """How a child has ended if not well; it is left for its parent to wait for."""
    with contextlib.suppress(ChildProcessError):
        end = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if end is not None and end.si_code != os.CLD_EXITED:
            return f"was ended by signal {end.si_status} (memory may have run out)"
        if end is not None and end.si_status != 0:
            return f"left with status {end.si_status}"
    return None


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
