"""A writing process that is killed ends the save, and not only its deadline.

Megatron-Core writes tensors in forked processes and waits until each has said that it is done. One
that is killed (by the kernel when memory runs out, say) never does. The end of a child is a signal
here, whose handler raises in the main thread, out of that wait.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

import psutil

from megatron_sr1.errors import CheckpointError


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
