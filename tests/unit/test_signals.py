"""Signals: checkpoint writers end with their rank, and requests to stop end no process."""

import os
import signal
import subprocess
import sys
import textwrap

import psutil
import pytest

WRITER_PROGRAM = """
import multiprocessing, sys, time
import psutil
from megatron_sr1.runtime import cpu, signals
from megatron_sr1.runtime.failure import guard
cpu.install()
signals.tie_checkpoint_writers()
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

with guard(sys.argv[1]):
    fork = multiprocessing.get_context("fork")
    results, counter = fork.SimpleQueue(), fork.JoinableQueue()
    bucket = (sys.argv[2], "", ([], []))
    # It waits for a number in the counter, which a rank that is killed has not written yet.
    writer = fork.Process(
        target=FileSystemWriterAsync.write_preloaded_data,
        args=([], 0, bucket, results, counter, True),
    )
    writer.start()
    assert results.get() == (0, [])
    print(*(child.pid for child in psutil.Process().children()), flush=True)
    time.sleep(300)
"""

RANK = """
    import os, signal, subprocess, sys
    from megatron_sr1.runtime import signals
    signals.listen(on_sigterm={on_sigterm})
    child = subprocess.Popen(["sleep", "60"])
    before = signals.stop_requested()
    print("ready", flush=True)
    sys.stdin.readline()
    print(before, signals.stop_requested(), child.poll())
    child.kill()
"""


def start(on_sigterm):
    code = textwrap.dedent(RANK.format(on_sigterm=on_sigterm))
    rank = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
        text=True,
    )
    assert rank.stdout.readline() == "ready\n"
    return rank


@pytest.mark.parametrize(
    ("number", "on_sigterm"), [(signal.SIGUSR1, False), (signal.SIGUSR1, True), (15, True)]
)
def test_a_signal_to_all_processes_of_a_rank_ends_none_and_is_detected(number, on_sigterm):
    rank = start(on_sigterm)
    os.killpg(rank.pid, number)
    assert rank.communicate("\n", timeout=60)[0] == "False True None\n"


def test_without_a_signal_no_stop_is_requested():
    assert start(True).communicate("\n", timeout=60)[0] == "False False None\n"


def test_sigterm_ends_a_rank_that_is_not_configured_to_save_on_it():
    rank = start(False)
    os.killpg(rank.pid, signal.SIGTERM)
    assert rank.wait(timeout=60) == -signal.SIGTERM
    rank.stdin.close(), rank.stdout.close()


def test_the_file_for_the_batch_script_is_created_if_one_is_named(tmp_path, monkeypatch):
    from megatron_sr1.runtime import signals

    monkeypatch.delenv(signals.UNFINISHED, raising=False)
    signals.mark_unfinished()
    monkeypatch.setenv(signals.UNFINISHED, str(tmp_path / "unfinished"))
    signals.mark_unfinished()
    assert [path.name for path in tmp_path.iterdir()] == ["unfinished"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_megatrons_writers_end_with_their_rank(tmp_path, number):
    command = [sys.executable, "-c", WRITER_PROGRAM, str(tmp_path / "run"), str(tmp_path / "file")]
    rank = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    children = [psutil.Process(int(pid)) for pid in rank.stdout.readline().split()]
    rank.send_signal(number)
    rank.wait(timeout=60)
    _, alive = psutil.wait_procs(children, timeout=30)
    for process in alive:
        process.kill()
    assert children and not alive
