"""Processes that a rank started end with it, whatever ends it."""

import signal
import subprocess
import sys

import psutil
import pytest

PROGRAM = """
import multiprocessing, sys, time
import psutil
from megatron_sr1.runtime import cpu, child_processes
from megatron_sr1.runtime.failure import guard
cpu.install()
child_processes.install()
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

with guard(sys.argv[1]):
    fork = multiprocessing.get_context("fork")
    told, counter = fork.SimpleQueue(), fork.JoinableQueue()
    bucket = (sys.argv[2], "", ([], []))
    # It waits for a number in the counter, which a rank that is killed has not written yet.
    writer = fork.Process(
        target=FileSystemWriterAsync.write_preloaded_data,
        args=([], 0, bucket, told, counter, True),
    )
    writer.start()
    assert told.get() == (0, [])
    print(*(child.pid for child in psutil.Process().children()), flush=True)
    time.sleep(300)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_megatrons_writers_end_with_their_rank(tmp_path, number):
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "run"), str(tmp_path / "file")]
    rank = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    children = [psutil.Process(int(pid)) for pid in rank.stdout.readline().split()]
    rank.send_signal(number)
    rank.wait(timeout=60)
    _, alive = psutil.wait_procs(children, timeout=30)
    for process in alive:
        process.kill()
    assert children and not alive
