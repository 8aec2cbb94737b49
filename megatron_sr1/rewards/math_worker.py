"""Processes that compare mathematical answers, started when first needed and killed at a limit.

math-verify can hang or use up all memory on sampled text, so it runs in a process of its own
(mathematics.py). Time and memory are watched from here, because the algebra catches its own
MemoryError and returns "not equal". During a slow comparison a spare process loads, which takes
over if the first is killed, so that other comparisons wait for the time limit and no longer. The
processes exit with this one, at the end of their standard input.
"""

from __future__ import annotations

import json
import math
import os
import select
import signal
import subprocess
import sys
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

import psutil

from megatron_sr1.errors import GradingError, GradingLimit

MEMORY_BYTES = 1 << 30
"""Limit of a process's resident memory; the libraries themselves take 60 MiB."""
WATCH_SECONDS = 0.05
"""Interval between two looks at the memory."""
START_SECONDS = 180.0
"""Time limit for loading the libraries, which takes a second on an idle machine."""
SLOW_SECONDS = 0.3
"""After this time a comparison may never end, so the spare process is started."""
READ_BYTES = 1 << 16
EXIT_SECONDS = 0.2
"""Time for an idle process to exit by itself before it is killed."""
CACHE_ENTRIES = 100_000
MAX_SHOWN_CHARACTERS = 200


class GraderProcess:
    """A process that reports that it is ready, then answers lines of JSON with such lines."""

    def __init__(self, command: tuple[str, ...], is_watched: bool = True) -> None:
        """Start the process without waiting for it to load; a watched one has a memory limit."""
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        pipe, environment = subprocess.PIPE, os.environ | {"PYTHONPATH": path}
        self._process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, env=environment, bufsize=0
        )
        self.pid = self._process.pid
        self._is_watched, self._read = is_watched, b""

    def wait_ready(self) -> dict[str, Any]:
        """Wait until the process has loaded and return what it says; OSError if it does not."""
        try:
            ready = self.reply(START_SECONDS)
        except TimeoutError:
            raise OSError(f"it did not start within {START_SECONDS:g} s") from None
        if "ready" not in ready:
            raise OSError(f"it started with {ready}")
        return ready

    def ask(self, request: dict[str, Any]) -> None:
        """Send a request of JSON values and dataclasses; raises OSError if the process exited."""
        assert self._process.stdin is not None
        left = memoryview(json.dumps(request, default=vars).encode() + b"\n")
        while left:
            left = left[self._process.stdin.write(left) or 0 :]

    def reply(self, seconds: float) -> dict[str, Any]:
        """Return the next reply; may be called again after a TimeoutError.

        Raises:
            TimeoutError: no reply within `seconds`.
            MemoryError: the process takes more than MEMORY_BYTES.
            OSError: the process exited.
            ValueError: the reply is not JSON.
        """
        assert self._process.stdout is not None
        ends, poll = time.monotonic() + seconds, select.poll()
        poll.register(self._process.stdout, select.POLLIN)
        while b"\n" not in self._read:
            longest = WATCH_SECONDS if self._is_watched else math.inf
            left = min(max(ends - time.monotonic(), 0.0), longest)
            if poll.poll(1000 * left if left < math.inf else None):
                read = os.read(self._process.stdout.fileno(), READ_BYTES)
                if not read:
                    raise OSError("its output ended; see standard error above")
                self._read += read
                continue
            if self._is_watched and psutil.Process(self.pid).memory_info().rss > MEMORY_BYTES:
                raise MemoryError(f"took more than {MEMORY_BYTES >> 20} MiB")
            if time.monotonic() >= ends:
                raise TimeoutError
        line, _, self._read = self._read.partition(b"\n")
        return dict(json.loads(line))

    def abort(self) -> None:
        """Have the process dump its stacks, if it does that, and die; for another thread."""
        self._process.send_signal(signal.SIGABRT)

    def close_input(self) -> None:
        """Have the process exit by itself, for a thread other than the one that waits for it."""
        assert self._process.stdin is not None
        self._process.stdin.close()

    def stop(self, seconds: float = 0.0) -> int:
        """Stop the process, killing it after `seconds`; returns its exit status."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()


class Uncomparable(Exception):
    """Reading or comparing a sampled answer raised, so the answer is wrong."""


class MathWorker:
    """Compare mathematical answers in another process, with a spare one for slow comparisons."""

    def __init__(
        self, timeout_seconds: float, command: tuple[str, ...] = (), grader: str = "rules"
    ) -> None:
        """Set the time limit per comparison, > 0; no process starts yet.

        `command` replaces the one that starts mathematics.py with a grader, rules | math_verify.
        """
        assert timeout_seconds > 0, timeout_seconds
        self._timeout_seconds = timeout_seconds
        module = "megatron_sr1.rewards.mathematics"
        self._command = command or (sys.executable, "-m", module, grader)
        self._process: GraderProcess | None = None
        self._spare: GraderProcess | None = None
        self._compared = lru_cache(CACHE_ENTRIES)(self._compare)

    def equal(self, gold: str, answer: str, sample_name: str) -> bool:
        """Return True if an answer equals the gold one; both without math delimiters.

        Results are cached, exceeded limits included.

        Raises:
            Uncomparable: reading or comparing the answer raised.
            GradingLimit: the comparison exceeded the time or memory limit, or ended the process.
            GradingError: gold cannot be compared with itself, or no grader starts.
        """
        what = f"{sample_name}: comparing answer {_shorten(answer)} with gold {_shorten(gold)}"
        try:
            reply = self._compared(gold, answer)
        except GradingError as error:
            raise type(error)(f"{what}: {error}") from None
        if "limit" in reply:
            raise GradingLimit(f"{what} {reply['limit']}")
        if "uncomparable" in reply:
            raise Uncomparable(reply["uncomparable"])
        return bool(reply["equal"])

    def close(self) -> None:
        """Stop both processes, busy or not."""
        self._stop_current(EXIT_SECONDS)
        self._process, self._spare = self._spare, None
        self._stop_current()

    def _compare(self, gold: str, answer: str) -> dict[str, Any]:
        """Return a reply that holds `equal`, `uncomparable`, or the description of a `limit`."""
        timed_out = f"took more than {self._timeout_seconds:g} s (reward.grader_timeout_seconds)"
        try:
            reply = self._ask(gold, answer)
        except (TimeoutError, MemoryError) as error:
            self._stop_current()
            return {"limit": str(error) or timed_out}
        except (OSError, ValueError) as error:
            code = self._stop_current(EXIT_SECONDS)
            # Its own timer fired while this process was suspended for longer than the limit.
            if code == -signal.SIGALRM:
                return {"limit": timed_out}
            ended = f"the grader ended (exit status {code})"
            if self._is_alive(gold):
                raise GradingLimit(ended) from None
            raise GradingError(f"{ended}: {error}") from None
        if "limit" in reply:
            self._stop_current()
            return {"limit": f"ended with {reply['limit']}"}
        if "equal" not in reply and "uncomparable" not in reply:
            raise GradingError(f"the grader broke: {reply.get('error', reply)}")
        return reply

    def _is_alive(self, gold: str) -> bool:
        """Return True if a new process can compare gold with itself: the answer is at fault."""
        try:
            return "equal" in self._ask(gold, gold)
        except (OSError, ValueError, MemoryError):
            self._stop_current()
            return False

    def _ask(self, gold: str, answer: str) -> dict[str, Any]:
        if self._process is None:
            self._process, self._spare = self._spare or GraderProcess(self._command), None
            self._process.wait_ready()
        self._process.ask({"gold": gold, "answer": answer, "seconds": self._timeout_seconds})
        first_wait = min(SLOW_SECONDS, self._timeout_seconds)
        try:
            return self._process.reply(first_wait)
        except TimeoutError:
            self._spare = self._spare or GraderProcess(self._command)
            return self._process.reply(self._timeout_seconds - first_wait)

    def _stop_current(self, seconds: float = 0.0) -> int | None:
        """Stop the current process; returns its exit status."""
        process, self._process = self._process, None
        return None if process is None else process.stop(seconds)


def _shorten(text: str) -> str:
    return repr(text[:MAX_SHOWN_CHARACTERS] + "…" * (len(text) > MAX_SHOWN_CHARACTERS))
