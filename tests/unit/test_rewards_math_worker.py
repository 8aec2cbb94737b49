"""The grading processes: limits, failures, the spare process, and the cost of a timeout."""

import os
import signal
import subprocess
import sys
import time

import pytest

from megatron_sr1.errors import GradingError, GradingLimit
from megatron_sr1.rewards import math_worker
from megatron_sr1.rewards.math_worker import MathWorker, Uncomparable
from tools.grading_rate import SLOW, measure


@pytest.fixture(scope="module")
def worker():
    worker = MathWorker(60.0)
    yield worker
    worker.close()


HANG = "import sys; print('{\"ready\": true}', flush=True); sys.stdin.readline(); "


def started_with(script: str, seconds: float = 1.0) -> MathWorker:
    return MathWorker(seconds, (sys.executable, "-c", script))


def test_a_hanging_grader_is_killed_and_replaced():
    worker = started_with(HANG + "import time; time.sleep(600)")
    for answer in ("2", "3"):
        with pytest.raises(GradingLimit, match=r"shard 3 sample 7: .*'1'.*more than 1 s"):
            worker.equal("1", answer, "shard 3 sample 7")
        assert worker._process is None
    worker.close()


def test_an_exceeded_limit_is_cached():
    worker = started_with(HANG + "import time; time.sleep(600)")
    for name in ("sample 7", "sample 8"):
        started = time.monotonic()
        with pytest.raises(GradingLimit, match=name):
            worker.equal("1", "2", name)
    assert time.monotonic() - started < 0.5
    worker.close()


def test_real_slow_algebra_is_a_limit_and_the_spare_takes_over():
    limited, started = MathWorker(5.0), time.monotonic()
    assert limited.equal("x+1", "1+x", "s")
    first, start_seconds = limited._process.pid, time.monotonic() - started
    with pytest.raises(GradingLimit, match="sample 9: .*more than 5 s"):
        limited.equal(*SLOW, "sample 9")
    spare = limited._spare.pid
    started = time.monotonic()
    assert limited.equal("x+2", "2+x", "s")
    # It had loaded during the slow comparison.
    assert time.monotonic() - started < start_seconds / 2
    assert limited._process.pid == spare != first
    limited.close()


def test_a_slow_answer_within_the_limit_keeps_both_processes():
    reply = "import time; time.sleep(1); print('{\"equal\": true}', flush=True); "
    slow = started_with(HANG + 2 * (reply + "sys.stdin.readline(); "), 30.0)
    assert slow.equal("1", "2", "s")
    first, spare = slow._process.pid, slow._spare.pid
    assert slow.equal("1", "3", "s")
    assert (slow._process.pid, slow._spare.pid) == (first, spare)
    slow.close()


def test_a_suspended_grader_exceeds_the_limit():
    stopped = MathWorker(1.0)
    assert stopped.equal("x+1", "1+x", "s")
    os.kill(stopped._process.pid, signal.SIGSTOP)
    with pytest.raises(GradingLimit, match="sample 5: .*more than 1 s"):
        stopped.equal("x+2", "2+x", "sample 5")
    assert stopped.equal("x+2", "3+x", "s") is False
    stopped.close()


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("held = []\nwhile True: held.append(b'x' * 10**7)", "more than 200 MiB"),
        ('print(\'{"limit": "MemoryError"}\', flush=True)', "ended with MemoryError"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGALRM)", "more than 30 s"),
    ],
)
def test_memory_and_the_graders_own_timer_are_limits(script, message, monkeypatch):
    monkeypatch.setattr(math_worker, "MEMORY_BYTES", 200 << 20)
    worker = started_with(HANG.rstrip("; ") + "\n" + script, 30.0)
    with pytest.raises(GradingLimit, match=f"sample 7: .*{message}"):
        worker.equal("1", "2", "sample 7")
    worker.close()


RAISES = """
import sys
from megatron_sr1.rewards import mathematics
def check(gold):
    if gold == "bad": raise KeyError("gold")
    return []
def compare(gold, answer):
    raise {kind}("answer")
mathematics.GRADERS["rules"] = (check, compare)
if {ready}: print('{{"ready": true}}', flush=True)
mathematics.serve(sys.stdout)
"""


def test_a_memory_error_inside_the_grader_is_reported_as_a_limit():
    script = RAISES.format(kind="MemoryError", ready=False)
    asked = b'{"gold": "1", "answer": "2", "seconds": 60}\n'
    ran = subprocess.run([sys.executable, "-c", script], input=asked, capture_output=True)
    assert ran.stdout.decode() == '{"limit": "MemoryError"}\n'


@pytest.mark.field
def test_an_exception_for_an_answer_is_a_verdict_and_one_for_gold_an_error():
    worker = started_with(
        RAISES.format(kind="RecursionError", ready=True).replace("\n{", "{"), 30.0
    )
    with pytest.raises(Uncomparable, match="RecursionError: answer"):
        worker.equal("1", "2", "sample 7")
    first = worker._process.pid
    with pytest.raises(Uncomparable):
        worker.equal("1", "3", "sample 7")
    assert worker._process.pid == first
    with pytest.raises(GradingError, match="sample 8: .*grader broke: KeyError: 'gold'") as caught:
        worker.equal("bad", "2", "sample 8")
    assert not isinstance(caught.value, GradingLimit)
    worker.close()


def test_a_timeout_does_not_slow_down_other_comparisons():
    clean, slow = measure(1000, 1, 5.0)
    assert (clean.num_limits, slow.num_limits) == (0, 1)
    assert slow.num_right == clean.num_right > 400
    # No other answer waited for a process to load, which took start_seconds on this machine.
    assert slow.longest_seconds < 0.8 * slow.start_seconds
    # tools/grading_rate.py measures it more precisely, with ten times as many.
    assert slow.seconds < 1.25 * clean.seconds + 0.5 * slow.start_seconds


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (HANG + "sys.exit(3)", r"exit status 3"),
        (HANG + "import os, signal; os.kill(os.getpid(), signal.SIGKILL)", r"exit status -9"),
        (HANG + 'print(\'{"error": "TypeError: x"}\', flush=True)', r"broke: TypeError: x"),
        (HANG + "print('nonsense', flush=True)", r"grader ended"),
        ("raise SystemExit(4)", r"exit status 4"),
        ("print('{\"error\": 1}', flush=True)", r"started with"),
    ],
)
def test_a_grader_that_breaks_raises_and_names_the_sample(script, message):
    with pytest.raises(GradingError, match=rf"(?s)sample 7: .*{message}"):
        started_with(script, 30.0).equal("1", "2", "sample 7")


def test_a_grader_killed_from_outside_is_a_limit_and_replaced(worker):
    assert worker.equal(r"\sqrt{18}", r"3\sqrt{2}", "s")
    os.kill(worker._process.pid, signal.SIGKILL)
    # A new process compares gold with itself, so neither gold nor grader is at fault.
    with pytest.raises(GradingLimit, match="sample 8: .*grader ended .exit status -9"):
        worker.equal(r"\sqrt{50}", r"5\sqrt{2}", "sample 8")
    assert worker.equal(r"\sqrt{50}", r"\sqrt{25}\sqrt{2}", "sample 8")


PARENT = """
import os, sys, threading
from megatron_sr1.rewards.math_worker import MathWorker, Uncomparable
threading.Thread(target=threading.Event().wait, daemon=True).start()
worker = MathWorker(60.0)
assert worker.equal("x+1", "1+x", "s")
print(worker._process.pid, flush=True)
os.kill(os.getpid(), 9)
"""


def test_the_grader_exits_when_its_parent_with_threads_is_killed():
    ranks = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost"}
    ran = subprocess.run(
        [sys.executable, "-c", PARENT], env=os.environ | ranks, capture_output=True, timeout=300
    )
    assert ran.returncode == -signal.SIGKILL, ran.stderr.decode()
    pid = int(ran.stdout)
    for _ in range(300):
        try:
            os.kill(pid, 0)
            with open(f"/proc/{pid}/stat") as file:
                if file.read().split()[2] == "Z":
                    return
        except (ProcessLookupError, FileNotFoundError):
            return
        time.sleep(0.1)
    raise AssertionError(f"process {pid} outlived its parent by 30 s")


def test_the_kernel_timer_ends_a_busy_grader_without_a_parent():
    script = (
        "import sys\nfrom megatron_sr1.rewards import mathematics\n"
        "def busy(gold, answer):\n    while True: pass\n"
        "mathematics.GRADERS['rules'] = (lambda gold: [], busy)\nmathematics.serve(sys.stdout)\n"
    )
    asked = b'{"gold": "1", "answer": "2", "seconds": 0.1}\n'
    ran = subprocess.run([sys.executable, "-c", script], input=asked, timeout=60)
    assert ran.returncode == -signal.SIGALRM


def test_replies_are_cached_but_a_killed_process_is_not():
    answering = "print('{\"equal\": true}', flush=True); sys.stdin.readline()"
    worker = started_with(HANG + answering, 30.0)
    assert worker.equal("1", "2", "s")
    os.kill(worker._process.pid, signal.SIGKILL)
    assert worker.equal("1", "2", "s")
    with pytest.raises(GradingLimit, match="exit status -9"):
        worker.equal("1", "3", "s")
    assert worker._compared.cache_info().currsize == 1
    worker.close()
