"""No process outlives the rank that started it.

A rank that is killed, or leaves by `os._exit`, runs no clean-up. The grading process ends with its
standard input. Megatron's writers and the manager of its result queue may wait for ever for a
parent that is gone, and a writer holds its parent's memory and pipes: here the kernel ends them
with their parent. The manager passes on bytes, so that it imports neither torch nor Megatron: a
second and 0.2 GiB on each rank.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import multiprocessing
import os
import pickle
import signal
from collections.abc import Callable
from multiprocessing.managers import SyncManager
from typing import Any

import psutil

PR_SET_PDEATHSIG = 1  # of Linux's prctl


def end_with(parent: int) -> None:
    """In a child: have the kernel end this process when its parent, so numbered, ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was quicker
        os._exit(1)


def end_children() -> None:
    """End all processes below this one."""
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            child.kill()


class _Results:
    """What Megatron needs of a queue: forked writers report to their rank."""

    def __init__(self, queue: Any) -> None:
        self._queue = queue

    def put(self, results: Any) -> None:
        """Report."""
        self._queue.put(pickle.dumps(results))

    def get_nowait(self) -> Any:
        """The oldest report.

        Raises:
            queue.Empty: there is none.
        """
        return pickle.loads(self._queue.get_nowait())


@functools.cache  # a writer killed while it connects leaves a manager that takes no connection more
def _result_queue() -> _Results:
    manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
    manager.start(initializer=end_with, initargs=(os.getpid(),))
    return _Results(manager.Queue())


def _ending_with_its_parent(write: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(write)  # Megatron looks at its signature
    def write_until_the_parent_ends(*arguments: Any, **settings: Any) -> Any:
        parent = multiprocessing.parent_process()
        if parent is not None and parent.pid is not None:  # None: in a thread of the rank, 0.19
            end_with(parent.pid)
        return write(*arguments, **settings)

    return write_until_the_parent_ends


@functools.cache
def install() -> None:
    """Megatron's writers, and its result queue, started at the first save, end with their parent.

    For Megatron-Core 0.16.1 and 0.19.2, which differ in the name of the queue's maker.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    older = hasattr(filesystem_async, "_get_write_results_queue")
    maker = "_get_write_results_queue" if older else "get_write_results_queue"
    setattr(filesystem_async, maker, _result_queue)
    writer = filesystem_async.FileSystemWriterAsync
    writer.write_preloaded_data = staticmethod(_ending_with_its_parent(writer.write_preloaded_data))
