"""The wish that a run leaves: a signal to every process of it, which none of them dies of."""

import os
import signal
import subprocess
import sys
import textwrap

import pytest

RANK = """
    import os, signal, subprocess, sys
    from megatron_sr1.runtime import stop_signal
    stop_signal.listen(on_sigterm={on_sigterm})
    child = subprocess.Popen(["sleep", "60"])
    before = stop_signal.stop_requested()
    print("ready", flush=True)
    sys.stdin.readline()
    print(before, stop_signal.stop_requested(), child.poll())
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
def test_a_signal_to_all_processes_of_a_rank_ends_none_and_is_found(number, on_sigterm):
    rank = start(on_sigterm)
    os.killpg(rank.pid, number)
    assert rank.communicate("\n", timeout=60)[0] == "False True None\n"


def test_without_a_signal_nobody_is_asked():
    assert start(True).communicate("\n", timeout=60)[0] == "False False None\n"


def test_sigterm_still_ends_a_rank_that_is_not_told_to_save_on_it():
    rank = start(False)
    os.killpg(rank.pid, signal.SIGTERM)
    assert rank.wait(timeout=60) == -signal.SIGTERM
    rank.stdin.close(), rank.stdout.close()


def test_the_file_for_the_batch_script_is_made_where_one_is_named(tmp_path, monkeypatch):
    from megatron_sr1.runtime import stop_signal

    monkeypatch.delenv(stop_signal.UNFINISHED, raising=False)
    stop_signal.mark_unfinished()
    monkeypatch.setenv(stop_signal.UNFINISHED, str(tmp_path / "unfinished"))
    stop_signal.mark_unfinished()
    assert [path.name for path in tmp_path.iterdir()] == ["unfinished"]
