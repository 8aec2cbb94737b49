"""No process outlives the rank that started it.

A rank that is killed, or leaves by `os._exit`, runs no clean-up. The grading process ends with its
standard input and Megatron's writers with their file, but the manager of Megatron's result queue
waits for ever: it is started here with the kernel's promise to end it with its parent. It passes on
bytes, so that it imports neither torch nor Megatron: a second and 0.2 GiB on each rank.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import multiprocessing
import os
import pickle
import signal
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


def install() -> None:
    """Let Megatron's checkpoint writers report to our queue, started at the first save."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    if hasattr(filesystem_async, "_get_write_results_queue"):
        filesystem_async._get_write_results_queue = _result_queue
