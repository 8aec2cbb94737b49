"""No process outlives the rank that started it.

A rank that is killed, or leaves by `os._exit`, runs no clean-up. The grading process ends with its
standard input. Megatron's writers may wait for ever for a parent that is gone, with its memory and
pipes in hand: the kernel ends them with it. Megatron starts one more process, for a queue of their
results; as the rank itself fills and empties that, a plain queue takes its place.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import multiprocessing
import os
import queue
import signal
from collections.abc import Callable
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
    """Have Megatron-Core, 0.16.1 or 0.19.2, start writers only, which end with their parent."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    older = hasattr(filesystem_async, "_get_write_results_queue")
    maker = "_get_write_results_queue" if older else "get_write_results_queue"
    setattr(filesystem_async, maker, queue.Queue)
    writer = filesystem_async.FileSystemWriterAsync
    writer.write_preloaded_data = staticmethod(_ending_with_its_parent(writer.write_preloaded_data))
