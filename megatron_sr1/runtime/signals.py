"""Signals between the processes of a run: parents that end, and requests to stop.

A rank that is killed, or leaves by `os._exit`, cannot clean up. The grading process ends when its
standard input closes. Megatron's checkpoint writers may wait for a dead parent forever, holding its
memory and pipes, so the kernel kills them with it.

A request to stop ends a run between two steps, with everything saved: before a time limit or
preemption. It is SIGUSR1 to any rank at any time, as Slurm's `--signal=USR1@300` sends it, or
SIGTERM where the configuration says so. The signals are blocked, not handled. Slurm sends one to
every process of the job: child processes inherit the block, so the grader and the checkpoint's
writers keep running, while the rank finds the signal pending. The price: a blocked SIGTERM stops
nothing, only SIGKILL does.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import multiprocessing
import os
import queue
import signal
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG = 1  # of Linux's prctl
_libc = ctypes.CDLL(None)  # loaded before any fork: afterwards the loader's lock may be held
STOP_SIGNALS = {signal.SIGUSR1, signal.SIGTERM}
UNFINISHED = "MEGATRON_SR1_UNFINISHED"
"""Environment variable with the path of the file that `mark_unfinished` creates."""


def end_with(parent: int, by: signal.Signals = signal.SIGKILL) -> None:
    """Have the kernel send a signal to this process when its parent ends; exit if it is gone."""
    _libc.prctl(PR_SET_PDEATHSIG, by)
    if os.getppid() != parent:  # it ended before the call
        os._exit(1)


def end_children() -> None:
    """Kill all descendants of this process."""
    import psutil  # here, so that the launcher need not load it

    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            child.kill()


@functools.cache
def tie_checkpoint_writers() -> None:
    """Patch Megatron-Core 0.16.1 and 0.19.2: it only starts writers, which end with this process.

    Megatron starts another process for the queue of their results. Only the rank itself uses that
    queue, so a plain `queue.Queue` replaces it.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    older = hasattr(filesystem_async, "_get_write_results_queue")
    maker = "_get_write_results_queue" if older else "get_write_results_queue"
    setattr(filesystem_async, maker, queue.Queue)
    write = filesystem_async.FileSystemWriterAsync.write_preloaded_data

    @functools.wraps(write)  # Megatron inspects the signature
    def write_until_the_parent_ends(*arguments: Any, **settings: Any) -> Any:
        parent = multiprocessing.parent_process()
        if parent is not None and parent.pid is not None:  # None in a thread of the rank (0.19)
            end_with(parent.pid)
        return write(*arguments, **settings)

    patched = staticmethod(write_until_the_parent_ends)
    filesystem_async.FileSystemWriterAsync.write_preloaded_data = patched


def listen(on_sigterm: bool = False) -> None:
    """Treat SIGUSR1, and optionally SIGTERM, as a request to stop.

    Must be called before the process has other threads.
    """
    chosen = STOP_SIGNALS if on_sigterm else {signal.SIGUSR1}
    signal.pthread_sigmask(signal.SIG_BLOCK, chosen)


def stop_requested() -> bool:
    """Return True if this process has received a request to stop."""
    return bool(STOP_SIGNALS & signal.sigpending())


def mark_unfinished() -> None:
    """Create the batch script's marker file, if it named one: saved, with steps left."""
    path = os.environ.get(UNFINISHED)
    if path:
        Path(path).touch()
