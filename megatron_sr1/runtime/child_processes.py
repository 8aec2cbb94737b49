"""Child processes that end with their parent.

A rank that is killed, or leaves by `os._exit`, cannot clean up. The grading process ends when its
standard input closes. Megatron's checkpoint writers may wait for a dead parent forever, holding its
memory and pipes, so the kernel kills them with it. Megatron starts another process for the queue of
their results; only the rank itself uses that queue, so a plain `queue.Queue` replaces it.
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

PR_SET_PDEATHSIG = 1  # of Linux's prctl
_libc = ctypes.CDLL(None)  # loaded before any fork: afterwards the loader's lock may be held


def end_with(parent: int, by: signal.Signals = signal.SIGKILL) -> None:
    """Have the kernel send a signal to this process when its parent ends.

    Args:
        parent: process id of the parent; if it is already gone, this process exits.
        by: the signal.
    """
    _libc.prctl(PR_SET_PDEATHSIG, by)
    if os.getppid() != parent:  # it has ended before the call
        os._exit(1)


def end_children() -> None:
    """Kill all descendants of this process."""
    import psutil  # here, so that the launcher need not load it

    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            child.kill()


def _ending_with_its_parent(write: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(write)  # Megatron inspects the signature
    def write_until_the_parent_ends(*arguments: Any, **settings: Any) -> Any:
        parent = multiprocessing.parent_process()
        if parent is not None and parent.pid is not None:  # None in a thread of the rank (0.19)
            end_with(parent.pid)
        return write(*arguments, **settings)

    return write_until_the_parent_ends


@functools.cache
def install() -> None:
    """Patch Megatron-Core 0.16.1 and 0.19.2: it only starts writers, which end with us."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    older = hasattr(filesystem_async, "_get_write_results_queue")
    maker = "_get_write_results_queue" if older else "get_write_results_queue"
    setattr(filesystem_async, maker, queue.Queue)
    writer = filesystem_async.FileSystemWriterAsync
    writer.write_preloaded_data = staticmethod(_ending_with_its_parent(writer.write_preloaded_data))
