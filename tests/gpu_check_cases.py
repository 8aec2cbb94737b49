"""Checks that misbehave, for the tests of tools/gpu_check.py's runner."""

import os
import signal
import time

from megatron_sr1.gpu_checks.registry import Check
from megatron_sr1.gpu_checks.rows import at_most, fact


class Bench:
    """What the runner asks of a bench, without torch."""

    def __init__(self, kind, directory):
        self.kind, self.directory = kind, directory

    def release(self):
        pass


def make_bench(kind, directory, model):
    return Bench(kind, directory)


def good(bench, number):
    yield fact("kind", bench.kind)
    yield at_most("number", float(number), 1.0, "a number above 1")


def raises(bench):
    yield fact("before", 1.0)
    raise ValueError("first line\nsecond line")


def crashes(bench):
    yield fact("before", 2.0)
    os.kill(os.getpid(), signal.SIGSEGV)


def hangs(bench):
    yield fact("before", 3.0)
    time.sleep(600)


def spoils(bench):
    """Leaves a device that cannot be used, as an illegal access to CUDA's memory does."""

    def unusable():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    bench.release = unusable
    yield fact("process", os.getpid())
    unusable()


def process(bench):
    yield fact("process", os.getpid())


def check(name, function, seconds=0.0, **more):
    meaning = more.pop("meaning", f"what {name} means")
    return Check(name, f"tests.gpu_check_cases:{function}", meaning, seconds, **more)


CHECKS = (
    check("good", "good", arguments=("1",)),
    check("raises", "raises"),
    check("too large", "good", arguments=("2",)),
    check("crashes", "crashes"),
    check("after a crash", "process"),
    check("spoils", "spoils"),
    check("after spoiling", "process"),
    check("same process", "process"),
    check("other session", "process", session="other"),
    check("without library", "good", needs=("no_such_library",), arguments=("1",)),
    check("hangs", "hangs"),
    check("long", "process", seconds=3600.0),
)
