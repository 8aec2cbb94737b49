"""A rank that fails takes the others with it: real torchrun, two gloo ranks."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_sr1 import cli
from megatron_sr1.errors import ConfigError
from megatron_sr1.runtime import failure_files
from megatron_sr1.runtime.failure import deadline, guard
from megatron_sr1.runtime.failure_files import (
    FAILURE_FILE,
    Failure,
    read_failure,
    summarize_failure,
)

AT_ONCE_SECONDS = 100
"""Start and end of two ranks on a loaded machine; what hangs in these tests would hang for 300."""

RANK_PROGRAM = """
import sys, time
import torch
import torch.distributed as dist
from megatron_sr1.errors import DataError
from megatron_sr1.runtime import failure
from megatron_sr1.runtime.failure import guard

# It ends as soon as all ranks have dumped; a loaded machine may need long for that.
failure.LINGER_SECONDS = 40

def main(run_dir, what):
    with guard(run_dir) as watch:
        dist.init_process_group("gloo")
        rank = dist.get_rank()
        dist.all_reduce(torch.ones(1))
        if rank == 1 and what == "raise":
            raise RuntimeError("the moon is missing")
        if rank == 1 and what == "user_error":
            raise DataError("shard-3.tar: sample 7: no answer")
        if rank == 1 and what == "kill":
            import os
            time.sleep(1)  # a rank is missed only if it was there
            os.kill(os.getpid(), 9)
        if what in ("kill", "raise_while_busy"):
            if rank == 1:
                raise RuntimeError("the moon is missing")
            time.sleep(300)
        if what == "both":
            raise DataError("shard-3.tar: sample 7: no answer")
        with watch.deadline("all_reduce of rank 0", 2.0 if what == "hang" else 300.0):
            if rank == 1 and what == "hang":
                time.sleep(300)
            if what == "fine":
                dist.barrier()
            else:
                dist.all_reduce(torch.ones(1))
        dist.destroy_process_group()

if __name__ == "__main__":
    main(*sys.argv[1:])
"""


def run_two_ranks(
    tmp_path: Path, what: str, launcher: str = "torch.distributed.run"
) -> tuple[subprocess.CompletedProcess, float, Path]:
    program, run_dir = tmp_path / "ranks.py", tmp_path / "run"
    program.write_text(RANK_PROGRAM)
    command = [sys.executable, "-m", launcher, "--standalone"]
    command += ["--nproc-per-node", "2", str(program), str(run_dir), what]
    environment = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=os.getcwd())
    started = time.monotonic()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=150)
    return done, time.monotonic() - started, run_dir


def test_a_normal_end_leaves_no_files(tmp_path):
    done, _, run_dir = run_two_ranks(tmp_path, "fine")
    assert done.returncode == 0, done.stderr
    assert not (run_dir / FAILURE_FILE).exists()
    assert not (run_dir / "stacks").exists(), "empty stack files are left behind"


def test_a_rank_that_raises_ends_the_other_one_in_a_collective(tmp_path):
    done, seconds, run_dir = run_two_ranks(tmp_path, "raise")
    assert done.returncode != 0
    assert seconds < AT_ONCE_SECONDS
    assert "Traceback" in done.stderr
    assert "megatron-sr1: error: rank 1: RuntimeError: the moon is missing" in done.stderr
    failure = json.loads((run_dir / FAILURE_FILE).read_text())
    assert failure["rank"] == 1 and failure["code"] == 1
    for rank in (0, 1):
        stacks = (run_dir / "stacks" / f"rank_{rank}.txt").read_text()
        assert "the moon is missing" in stacks and "most recent call first" in stacks
    assert "all_reduce" in (run_dir / "stacks" / "rank_0.txt").read_text()


def test_a_missed_deadline_ends_all_ranks_and_names_the_phase(tmp_path):
    done, seconds, run_dir = run_two_ranks(tmp_path, "hang")
    assert done.returncode != 0
    assert seconds < AT_ONCE_SECONDS
    assert "all_reduce of rank 0 took longer than its deadline of 2 s" in done.stderr
    for rank in (0, 1):
        assert (run_dir / "stacks" / f"rank_{rank}.txt").stat().st_size > 0


@pytest.mark.field
def test_a_users_error_is_one_line_without_traceback(tmp_path):
    done, _, run_dir = run_two_ranks(tmp_path, "user_error", "megatron_sr1.launch.torchrun")
    assert done.stderr == "megatron-sr1: error: rank 1: shard-3.tar: sample 7: no answer\n"
    assert done.returncode != 0
    assert json.loads((run_dir / FAILURE_FILE).read_text())["code"] == 2
    assert "DataError" in (run_dir / "stacks" / "rank_1.txt").read_text()


@pytest.mark.field
def test_the_same_error_on_all_ranks_is_reported_once_under_any_torchrun(tmp_path):
    done, _, _ = run_two_ranks(tmp_path, "both")
    assert done.returncode != 0
    assert done.stderr.count("sample 7: no answer") == done.stderr.count("megatron-sr1") == 1


def test_a_busy_rank_is_ended_by_its_own_watcher(tmp_path):
    done, seconds, run_dir = run_two_ranks(tmp_path, "raise_while_busy")
    assert done.returncode != 0
    assert seconds < AT_ONCE_SECONDS
    # The line before the stacks is the watch's; a signal from torchrun writes stacks alone.
    assert "stopped by rank 1: RuntimeError" in (run_dir / "stacks" / "rank_0.txt").read_text()


def test_a_killed_rank_is_named_by_the_other_and_leaves_its_stacks(tmp_path):
    done, seconds, run_dir = run_two_ranks(tmp_path, "kill")
    assert done.returncode != 0
    assert seconds < 30  # below LINGER_SECONDS: nobody waits for the dump of a dead rank
    failure = json.loads((run_dir / FAILURE_FILE).read_text())
    assert failure["rank"] == 1 and "its process is gone" in failure["cause"]
    assert "rank 0 stops in no phase, main (" in done.stderr
    assert "most recent call first" in (run_dir / "stacks" / "rank_0.txt").read_text()


def alone(code: str, tmp_path: Path) -> subprocess.CompletedProcess:
    text = f"import time\nfrom megatron_sr1.runtime.failure import guard, deadline\n{code}"
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    return subprocess.run(
        [sys.executable, "-c", text, str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=150,
    )


@pytest.mark.parametrize("pause_seconds", [None, 0.0, 0.6], ids=["first", "at once", "later"])
def test_a_deadline_ends_the_process_while_the_interpreter_lock_is_held(tmp_path, pause_seconds):
    # PyDLL calls keep the lock, so that no Python thread runs: only the timer in C can strike. The
    # watcher sets it, so it may still be that of a block which has ended, or not be set at all.
    before = (
        ""
        if pause_seconds is None
        else f"""
    with deadline("before", 60):
        pass
    time.sleep({pause_seconds})
"""
    )
    code = f"""
import ctypes
from megatron_sr1.runtime import failure
failure.BACKUP_SECONDS = 0.5
with guard({str(tmp_path)!r}):{before}
    with deadline("a call in C", 0.5):
        ctypes.PyDLL(None).sleep(300)
"""
    started = time.monotonic()
    done = alone(code, tmp_path)
    assert done.returncode != 0 and time.monotonic() - started < AT_ONCE_SECONDS
    assert "most recent call first" in (tmp_path / "stacks" / "rank_0.txt").read_text()


def test_a_rank_whose_stderr_is_closed_still_ends(tmp_path):
    code = "import sys, time\nfrom megatron_sr1.runtime.failure import guard, deadline\n"
    code += "with guard(sys.argv[1]), deadline('sleep', 0.5):\n    time.sleep(300)\n"
    reader, writer = os.pipe()
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stderr=writer)
    os.close(writer)
    os.close(reader)
    try:
        assert process.wait(timeout=AT_ONCE_SECONDS) == 1
    finally:
        process.kill()
    assert "deadline of 0.5 s" in (tmp_path / "stacks" / "rank_0.txt").read_text()


def test_an_inner_deadline_ends_with_its_block(tmp_path):
    code = f"""
from megatron_sr1.runtime import failure
failure.BACKUP_SECONDS = 1.0  # the timer in C ends, too
with guard({str(tmp_path)!r}):
    with deadline("outer", 20):
        with deadline("inner", 0.6):
            time.sleep(0.5)
        time.sleep(3)
"""
    done = alone(code, tmp_path)
    assert done.returncode == 0, done.stderr


def test_the_cause_is_the_last_line_and_the_status_is_two(tmp_path):
    code = f"""
from megatron_sr1.errors import ConfigError
with guard({str(tmp_path)!r}):
    raise ConfigError("seed is 'x';\\n  expected a number")
"""
    done = alone(code, tmp_path)
    assert done.returncode == 2
    assert done.stderr == "megatron-sr1: error: rank 0: seed is 'x'; expected a number\n"


def test_a_failure_of_an_earlier_launch_is_ignored_and_then_removed(tmp_path):
    old = {"rank": 0, "cause": "old", "code": 1, "time": time.time() - 3600, "launch": ""}
    (tmp_path / FAILURE_FILE).write_text(json.dumps(old))
    assert read_failure(tmp_path, since=time.time() - 7200) is not None
    done = alone(f"with guard({str(tmp_path)!r}):\n    time.sleep(1)\n", tmp_path)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / FAILURE_FILE).exists(), "a good end leaves an old failure standing"


def test_a_failure_of_another_launch_in_the_same_second_is_ignored(tmp_path):
    code = f"""
import json, os
old = {{"rank": 1, "cause": "old", "code": 1, "time": time.time(), "launch": "another"}}
with open({str(tmp_path / FAILURE_FILE)!r}, "w") as file:
    json.dump(old, file)
os.environ.update(RANK="0", WORLD_SIZE="2")
with guard({str(tmp_path)!r}):
    time.sleep(1)
"""
    done = alone(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / FAILURE_FILE).exists()


def test_a_deadline_without_a_guard_does_nothing():
    with deadline("nothing", 0.001):
        time.sleep(0.01)


def test_sigterm_is_reported_and_dumps_stacks_while_the_main_thread_is_in_c(tmp_path):
    code = "import ctypes, sys\nfrom megatron_sr1.runtime.failure import guard\n"
    code += "with guard(sys.argv[1]):\n    print('up', flush=True)\n"
    # As in a collective: the lock is free, and the call goes on after a signal.
    code += "    while True:\n        ctypes.CDLL(None).pause()\n"
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", code, str(tmp_path)]
    process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True)
    assert process.stdout.readline() == "up\n"
    process.terminate()
    _, told = process.communicate(timeout=AT_ONCE_SECONDS)
    assert process.returncode == 128 + signal.SIGTERM
    assert told == "megatron-sr1: error: rank 0: stopped from outside by SIGTERM\n"
    assert json.loads((tmp_path / FAILURE_FILE).read_text())["code"] == 128 + signal.SIGTERM
    assert "most recent call first" in (tmp_path / "stacks" / "rank_0.txt").read_text()


def test_terminating_a_forked_child_does_not_end_its_rank(tmp_path):
    code = f"""
import os, signal
with guard({str(tmp_path)!r}):
    child = os.fork()
    if child == 0:
        time.sleep(300)
    time.sleep(0.5)
    os.kill(child, signal.SIGTERM)
    assert os.waitpid(child, 0)[1] == signal.SIGTERM
    time.sleep(1)
"""
    done = alone(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "stacks").exists()


def test_a_rank_ends_when_the_process_that_started_it_is_killed(tmp_path):
    rank = "import time\nfrom megatron_sr1.runtime.failure import guard\n"
    rank += f"with guard({str(tmp_path)!r}):\n"
    rank += "    print('up', flush=True)\n    time.sleep(300)\n"
    starter = "import subprocess, sys\nsubprocess.run([sys.executable, '-c', sys.argv[1]])"
    process = subprocess.Popen(
        [sys.executable, "-c", starter, rank],
        env={**os.environ, "RANK": "0", "WORLD_SIZE": "2"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert process.stdout.readline() == b"up\n"
    process.kill()
    told = process.stdout.read().decode()  # until the rank, which has the other end, is gone too
    assert "rank 0: the process that started this rank is gone" in told


def test_a_run_directory_holds_one_run_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(failure_files, "PATIENCE_SECONDS", 0.3)
    code = "import sys\nfrom megatron_sr1.runtime.failure import guard\n"
    code += "with guard(sys.argv[1]):\n    print('up', flush=True)\n    sys.stdin.read()\n"
    command = [sys.executable, "-c", code, str(tmp_path)]
    first = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert first.stdout.readline() == b"up\n"
    with (
        pytest.raises(ConfigError, match="another process is rank 0 of this run"),
        guard(tmp_path),
    ):
        pass
    first.communicate(b"")
    assert first.returncode == 0, "the second start ended the first run"
    with guard(tmp_path):
        pass


@pytest.mark.field
def test_the_command_adds_nothing_to_a_users_error_and_exits_with_its_status(tmp_path, capsys):
    failure = {"rank": 1, "cause": "no answer", "code": 2, "time": time.time(), "launch": ""}
    (tmp_path / FAILURE_FILE).write_text(json.dumps(failure))
    assert cli._with_cause(1, tmp_path, time.time()) == 2
    assert capsys.readouterr().err == ""
    (tmp_path / FAILURE_FILE).write_text(json.dumps(failure | {"code": 1}))
    assert cli._with_cause(1, tmp_path, time.time()) == 1
    assert capsys.readouterr().err.startswith("megatron-sr1: error: rank 1: no answer (stacks in ")


def test_the_summary_names_the_rank_in_another_place_first(tmp_path):
    (tmp_path / "stacks").mkdir()
    for rank in range(12):
        where = "reward, hang (a.py:1)" if rank == 7 else "share, all_gather (b.py:2)"
        (tmp_path / "stacks" / f"rank_{rank}.txt").write_text(f"now: why\nwas in {where}\n\n")
    failure = Failure(3, "share took longer", 1)
    cause, odd, others = summarize_failure(tmp_path, failure, since=time.time() - 60)
    assert cause.startswith("megatron-sr1: error: rank 3: share took longer (stacks in ")
    assert odd == "  rank 7 in reward, hang (a.py:1)"
    assert others == "  ranks 0, 1, 2, 3, 4, 5, 6, 8 and 3 more in share, all_gather (b.py:2)"
    assert len(summarize_failure(tmp_path, failure, since=time.time() + 60)) == 1


def test_system_exit_passes_through(tmp_path):
    with pytest.raises(SystemExit, match="3"), guard(tmp_path):
        raise SystemExit(3)
    assert not (tmp_path / FAILURE_FILE).exists()
