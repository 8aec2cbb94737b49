"""Return this process's free host memory to the system.

Batches of varying shapes leave holes between live allocations. glibc keeps the holes and returns
only the end of its heaps, so that resident memory grows for hundreds of steps.
"""

from __future__ import annotations

import ctypes
from contextlib import suppress

STEPS_BETWEEN = 10
"""Steps between two calls: the step after a call has to request the returned memory again."""


def give_back() -> None:
    """Return free pages of all heaps (malloc_trim(3)); does nothing if the C library lacks it."""
    with suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
