"""Requests to stop between two steps, with everything saved: before a time limit or preemption.

In: SIGUSR1 to any rank at any time, as Slurm's `--signal=USR1@300` sends it, or SIGTERM where the
configuration says so. Out: `stop_requested`, which a stage checks after each step, and the file
that tells the batch script to requeue the job.

The signals are blocked, not handled. Slurm sends one to every process of the job: child processes
inherit the block, so the grader and the checkpoint's writers keep running, while the rank finds
the signal pending. The price: a blocked SIGTERM stops nothing, only SIGKILL does.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

SIGNALS = {signal.SIGUSR1, signal.SIGTERM}
UNFINISHED = "MEGATRON_SR1_UNFINISHED"
"""Environment variable with the path of the file that `mark_unfinished` creates."""


def listen(on_sigterm: bool = False) -> None:
    """Treat SIGUSR1, and optionally SIGTERM, as a request to stop.

    Must be called before the process has other threads.
    """
    chosen = SIGNALS if on_sigterm else {signal.SIGUSR1}
    signal.pthread_sigmask(signal.SIG_BLOCK, chosen)


def stop_requested() -> bool:
    """Return True if this process has received a request to stop."""
    return bool(SIGNALS & signal.sigpending())


def mark_unfinished() -> None:
    """Create the file, where the batch script named one, that says: saved, steps are left."""
    path = os.environ.get(UNFINISHED)
    if path:
        Path(path).touch()
