"""Host memory that is free in this process goes back to the system.

Batches of ever new shapes leave holes between what lives on. glibc keeps them for later and gives
back the end of its heaps alone, so that resident memory creeps up for hundreds of steps.
"""

from __future__ import annotations

import ctypes
from contextlib import suppress

STEPS_BETWEEN = 10
"""Steps from one call to the next: what a call gives back the next step has to ask for again."""


def give_back() -> None:
    """Return free pages of all heaps (malloc_trim(3)); nothing where the C library has no such."""
    with suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
