"""Every hostile input is read within a time limit, and leaves no trace of having been executed."""

import signal

import pytest

SECONDS = 100


@pytest.fixture(autouse=True)
def time_limit():
    """A hang is a failure of the test, not of the whole run."""

    def stop(number, frame):
        raise TimeoutError(f"a hostile input was still being read after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)
