"""Processes that compare mathematical answers, started when first needed and killed at a limit.

In: two mathematical answers. Out: whether they are equal, or that the answer cannot be compared.
math-verify can hang or take all memory on sampled text, so it runs in a process of its own
(mathematics.py), which answers each line of JSON with one. Time and memory are watched from here:
inside, the algebra catches its own MemoryError and says "no". While a slow comparison is waited
for, a spare process loads and takes over if the first is killed: the other comparisons lose the
time limit once and nothing else. The processes exit when this one does, at the end of their
standard input.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

from megatron_sr1.errors import GradingError, GradingLimit

MEMORY_BYTES = 1 << 30
"""Resident memory that a comparison may take; the algebra itself is 60 MiB."""
WATCH_SECONDS = 0.05
"""Memory is looked at so often."""
START_SECONDS = 180.0
"""Importing the algebra may take so long (a second on an idle machine)."""
SLOW_SECONDS = 0.3
"""A comparison that takes so long may never end: the spare process starts."""
LEAVE_SECONDS = 0.2
"""A process that is not busy has so long to end by itself."""
CACHE_ENTRIES = 100_000
MAX_SHOWN_CHARACTERS = 200


class GraderProcess:
    """A process that says it is ready, and then answers each line with one."""

    def __init__(self, command: tuple[str, ...]) -> None:
        """Start it; what it loads is not waited for."""
        root = str(Path(__file__).resolve().parents[2])
        paths = [root, os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in paths if p)}
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            bufsize=0,
        )
        self._line = b""

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def wait_ready(self, seconds: float) -> None:
        """Wait until it has loaded, at most so many seconds.

        Raises:
            OSError: it ended, took too long, or said something else.
        """
        try:
            ready = self.reply(seconds)
        except TimeoutError:
            raise OSError(f"it did not start within {seconds:g} s") from None
        if "ready" not in ready:
            raise OSError(f"it started with {ready}")

    def ask(self, asked: dict[str, Any]) -> None:
        """Send a question; `reply` has the answer.

        Raises:
            OSError: it ended.
        """
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asked).encode() + b"\n")

    def reply(self, seconds: float) -> dict[str, Any]:
        """The next line of the process; may be asked for again after a TimeoutError.

        Raises:
            TimeoutError: none came within so many seconds.
            MemoryError: it took more than MEMORY_BYTES.
            OSError: it ended.
            ValueError: the reply is no JSON.
        """
        assert self._process.stdout is not None
        pipe, ends = self._process.stdout.fileno(), time.monotonic() + seconds
        poll = select.poll()
        poll.register(pipe, select.POLLIN)
        while not self._line.endswith(b"\n"):
            left = ends - time.monotonic()
            if left <= 0:
                raise TimeoutError
            if not poll.poll(1000 * min(left, WATCH_SECONDS)):
                if self._resident_bytes() > MEMORY_BYTES:
                    raise MemoryError
                continue
            part = os.read(pipe, 65536)
            if not part:
                raise OSError("its output ended; see standard error above")
            self._line += part
        line, self._line = self._line, b""
        reply = json.loads(line)
        assert isinstance(reply, dict)
        return reply

    def end(self, seconds: float = 0.0) -> int:
        """Let it leave within so many seconds, then kill it; returns its exit status."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def _resident_bytes(self) -> int:
        """Memory of the process; 0 where the system has no /proc."""
        try:
            pages = Path(f"/proc/{self.pid}/statm").read_text().split()[1]
        except OSError:
            return 0
        return int(pages) * os.sysconf("SC_PAGE_SIZE")


class Uncomparable(Exception):
    """A library raised while it read or compared a sampled answer, which is therefore wrong."""


class MathWorker:
    """Compares mathematical answers in a process of its own, and has a spare for a slow one."""

    def __init__(
        self,
        timeout_seconds: float,
        command: tuple[str, ...] | None = None,
        grader: str = "rules",
    ) -> None:
        """Remember the limits; nothing starts yet.

        Args:
            timeout_seconds: one comparison may take so long, > 0.
            command: the process to start instead of mathematics.py, for tests.
            grader: rules | math_verify.
        """
        assert timeout_seconds > 0, timeout_seconds
        self._timeout_seconds = timeout_seconds
        program = (sys.executable, "-m", "megatron_sr1.rewards.mathematics", grader)
        self._command = command or program
        self._process: GraderProcess | None = None
        self._spare: GraderProcess | None = None
        self._known: dict[tuple[str, str], dict[str, Any]] = {}

    @property
    def pid(self) -> int | None:
        """Of the process that is asked, None while there is none."""
        return None if self._process is None else self._process.pid

    def equal(self, gold: str, answer: str, sample_name: str) -> bool:
        """Whether an answer equals the gold one as mathematics; remembered, limits too.

        Args:
            gold: without math delimiters.
            answer: the same.
            sample_name: for the message.

        Raises:
            Uncomparable: reading or comparing the answer raised.
            GradingLimit: the comparison ran out of time or memory, or ended the process.
            GradingError: gold cannot be compared even with itself, or no grader starts.
        """
        pair = (gold, answer)
        what = f"{sample_name}: comparing answer {_shown(answer)} with gold {_shown(gold)}"
        known = self._known.get(pair)
        if known is None:
            known = self._compare(gold, answer, what)
            if len(self._known) >= CACHE_ENTRIES:
                self._known.clear()
            self._known[pair] = known
        if "limit" in known:
            raise GradingLimit(f"{what} {known['limit']}")
        if "uncomparable" in known:
            raise Uncomparable(known["uncomparable"])
        return bool(known["equal"])

    def close(self) -> None:
        """End both processes, whatever they are doing."""
        self._drop(LEAVE_SECONDS)
        if self._spare is not None:
            self._spare.end()
            self._spare = None

    def _compare(self, gold: str, answer: str, what: str) -> dict[str, Any]:
        """The reply of a process: `equal`, `uncomparable`, or `limit` with the one that was met."""
        asked = {"gold": gold, "answer": answer, "seconds": self._timeout_seconds}
        timed_out = f"took more than {self._timeout_seconds:g} s (reward.grader_timeout_seconds)"
        try:
            reply = self._ask(asked)
        except TimeoutError:
            self._drop()
            return {"limit": timed_out}
        except MemoryError:
            self._drop()
            return {"limit": f"took more than {MEMORY_BYTES >> 20} MiB"}
        except (OSError, ValueError) as error:
            code = self._drop(LEAVE_SECONDS)
            # Its own timer, where this process was stopped for longer than the limit.
            if code == -signal.SIGALRM:
                return {"limit": timed_out}
            ended = f"the grader ended (exit status {code})"
            self._check_alive(gold, f"{what}: {ended}: {error}")
            raise GradingLimit(f"{what} failed, {ended}") from None
        if "limit" in reply:
            self._drop()
            return {"limit": f"ended with {reply['limit']}"}
        if "equal" not in reply and "uncomparable" not in reply:
            _broke(f"{what}: the grader broke: {reply.get('error', reply)}")
        return reply

    def _check_alive(self, gold: str, message: str) -> None:
        """Raise unless a new process can compare gold with gold: then the answer was to blame."""
        asked = {"gold": gold, "answer": gold, "seconds": self._timeout_seconds}
        try:
            reply = self._ask(asked)
        except (OSError, ValueError, MemoryError):
            self._drop()
            _broke(message)
        if "equal" not in reply:
            _broke(message)

    def _ask(self, asked: dict[str, Any]) -> dict[str, Any]:
        if self._process is None:
            self._process = self._spare or GraderProcess(self._command)
            self._spare = None
            self._process.wait_ready(START_SECONDS)
        self._process.ask(asked)
        patience = min(SLOW_SECONDS, self._timeout_seconds)
        try:
            return self._process.reply(patience)
        except TimeoutError:
            self._spare = self._spare or GraderProcess(self._command)
            return self._process.reply(self._timeout_seconds - patience)

    def _drop(self, seconds: float = 0.0) -> int | None:
        """End the process that was asked; returns its exit status."""
        process, self._process = self._process, None
        return None if process is None else process.end(seconds)


def _broke(message: str) -> NoReturn:
    raise GradingError(message) from None


def _shown(text: str) -> str:
    cut = text if len(text) <= MAX_SHOWN_CHARACTERS else text[:MAX_SHOWN_CHARACTERS] + "…"
    return repr(cut)
