"""Leave between two steps when asked to, with everything saved: a time limit or preemption nears.

In: SIGUSR1 to any rank at any time, as Slurm's `--signal=USR1@300` sends it, or SIGTERM where the
configuration says so. Out: `is_asked`, which a stage looks at after each step, and the file that
tells the batch script to have the job queued again.

The signals are blocked, not handled. Slurm sends one to every process of the job: blocking is
inherited by all that a rank starts, so the grader and the checkpoint's writers live on, while the
rank finds the signal pending. The price: a blocked SIGTERM ends nothing, only SIGKILL does.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

SIGNALS = {signal.SIGUSR1, signal.SIGTERM}
UNFINISHED = "MEGATRON_SR1_UNFINISHED"
"""Variable with the path of the file that `tell_unfinished` makes."""


def listen(on_sigterm: bool = False) -> None:
    """Take SIGUSR1, and SIGTERM too if told to, as the wish that this process leaves.

    To be called before the process has other threads.
    """
    chosen = SIGNALS if on_sigterm else {signal.SIGUSR1}
    signal.pthread_sigmask(signal.SIG_BLOCK, chosen)


def is_asked() -> bool:
    """Whether the wish has come to this process."""
    return bool(SIGNALS & signal.sigpending())


def tell_unfinished() -> None:
    """Make the file for the batch script, where one has named it: saved, not at the end."""
    path = os.environ.get(UNFINISHED)
    if path:
        Path(path).touch()
