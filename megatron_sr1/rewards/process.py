"""One grading process: started without waiting, asked a question at a time, killed if need be.

In: the command to start and lines of JSON. Out: lines of JSON, each within limits of time and
memory, both watched from here: inside, the algebra catches its own MemoryError and says "no". The
process ends by itself when this one does, at the end of its standard input.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import time
from pathlib import Path
from typing import Any

MEMORY_BYTES = 1 << 30
"""Resident memory that a comparison may take; the algebra itself is 60 MiB."""
WATCH_SECONDS = 0.05
"""Memory is looked at so often."""


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
