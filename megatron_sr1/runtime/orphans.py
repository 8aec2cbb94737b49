"""No process outlives the rank that started it.

A rank that is killed, or leaves by `os._exit`, runs no clean-up. The grading process ends with its
standard input and Megatron's writers with their file, but the manager of Megatron's result queue
waits for ever: it is started here with the kernel's promise to end it with its parent.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import multiprocessing
import os
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


@functools.cache
def _result_queue() -> Any:
    manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
    manager.start(initializer=end_with, initargs=(os.getpid(),))
    return manager.Queue()


def install() -> None:
    """Let Megatron's checkpoint writers report to our queue, started at the first save."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    if hasattr(filesystem_async, "_get_write_results_queue"):
        filesystem_async._get_write_results_queue = _result_queue
