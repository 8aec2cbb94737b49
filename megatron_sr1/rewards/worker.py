"""The grader's other half: a process that can be killed, started when first needed.

In: two mathematical answers. Out: whether they are equal. math-verify can hang or take all
memory on sampled text; so it works in a process of its own (mathematics.py), which is killed at
the time limit and started anew. It ends by itself when this process does: at the end of its
standard input, or by its own timer when it is in the middle of something.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from megatron_sr1.errors import GradingError

START_SECONDS = 180.0
"""Importing the algebra may take so long (seconds on an idle machine)."""
CACHE_ENTRIES = 100_000


class MathWorker:
    """Compares mathematical answers in a process of its own."""

    def __init__(self, timeout_seconds: float, command: tuple[str, ...] | None = None) -> None:
        """Remember the limits; nothing starts yet.

        Args:
            timeout_seconds: one comparison may take so long, > 0.
            command: the process to start instead of mathematics.py, for tests.
        """
        assert timeout_seconds > 0, timeout_seconds
        self._timeout_seconds = timeout_seconds
        self._command = command or (sys.executable, "-m", "megatron_sr1.rewards.mathematics")
        self._process: subprocess.Popen[bytes] | None = None
        self._known: dict[tuple[str, str], bool] = {}

    @property
    def pid(self) -> int | None:
        """Of the process, None while there is none."""
        return None if self._process is None else self._process.pid

    def equal(self, gold: str, answer: str, sample_name: str) -> bool:
        """Whether an answer equals the gold one as mathematics; remembered.

        Args:
            gold: without math delimiters.
            answer: the same.
            sample_name: for the message.

        Raises:
            GradingError: the comparison broke or ran out of time; the process is new afterwards.
        """
        known = self._known.get((gold, answer))
        if known is not None:
            return known
        asked = {"gold": gold, "answer": answer, "seconds": self._timeout_seconds}
        what = f"{sample_name}: comparing answer {answer!r} with gold {gold!r}"
        try:
            self._start()
            reply = self._ask(asked)
        except TimeoutError:
            self.close()
            raise GradingError(
                f"{what} took more than {self._timeout_seconds:g} s; raise "
                "reward.grader_timeout_seconds or look at the sample"
            ) from None
        except (OSError, ValueError) as error:
            code = self._end()
            raise GradingError(f"{what}: the grader ended (exit status {code}): {error}") from None
        if "equal" not in reply:
            raise GradingError(f"{what}: the grader broke: {reply.get('error', reply)}")
        if len(self._known) >= CACHE_ENTRIES:
            self._known.clear()
        return self._known.setdefault((gold, answer), bool(reply["equal"]))

    def close(self) -> None:
        """End the process, whatever it is doing."""
        self._end()

    def _start(self) -> None:
        if self._process is not None:
            return
        root = str(Path(__file__).resolve().parents[2])
        paths = [root, os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in paths if p)}
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            bufsize=0,
        )
        try:
            ready = self._read(START_SECONDS)
        except TimeoutError:
            raise OSError(f"it did not start within {START_SECONDS:g} s") from None
        if "ready" not in ready:
            raise OSError(f"it started with {ready}")

    def _ask(self, asked: dict[str, Any]) -> dict[str, Any]:
        assert self._process is not None and self._process.stdin is not None
        self._process.stdin.write(json.dumps(asked).encode() + b"\n")
        return self._read(self._timeout_seconds)

    def _read(self, seconds: float) -> dict[str, Any]:
        """The next line of the process, within so many seconds."""
        assert self._process is not None and self._process.stdout is not None
        pipe, line, ends = self._process.stdout.fileno(), b"", time.monotonic() + seconds
        poll = select.poll()
        poll.register(pipe, select.POLLIN)
        while not line.endswith(b"\n"):
            left = ends - time.monotonic()
            if left <= 0 or not poll.poll(1000 * left):
                raise TimeoutError
            part = os.read(pipe, 65536)
            if not part:
                raise OSError("its output ended; see standard error above")
            line += part
        reply = json.loads(line)
        assert isinstance(reply, dict)
        return reply

    def _end(self) -> int | None:
        process, self._process = self._process, None
        if process is None:
            return None
        time_to_leave = 0.2 if process.poll() is None else 0.0
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()
        try:
            return process.wait(time_to_leave)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()
