"""Runs checks in processes of their own, keeps to a time limit, and writes each row at once.

A check that raises, crashes its process or hangs is a row, and the next one runs in a new process.
The file is replaced after every row and names the check that is running, so that a kill at any time
loses nothing. This process imports neither torch nor CUDA.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import itertools
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from megatron_sr1.gpu_checks.registry import Check
from megatron_sr1.gpu_checks.rows import ERROR, SKIPPED, Row
from megatron_sr1.runtime.files import write_text

REGISTRY = "megatron_sr1.gpu_checks.registry"
PATIENCE = 4.0
"""A check is stopped after this many times its expected seconds,"""
LEAST_SECONDS = {"cuda": 120.0, "cpu": 900.0}
"""but not before these: the first one of a process imports libraries, and a CPU is slow."""


@dataclass
class Runner:
    """A run of checks.

    Attributes:
        kind: cuda or cpu.
        directory: where the checks put files.
        output: the table, JSON; what libraries print goes to the same name with `.log`.
        minutes: time limit of the whole run.
        show: called with each row.
        model: a Hugging Face directory; None for one that is made.
        registry: module with `CHECKS` and `make_bench`.
    """

    kind: str
    directory: Path
    output: Path
    minutes: float
    show: Callable[[Row], None]
    model: Path | None = None
    registry: str = REGISTRY
    rows: list[Row] = field(default_factory=list)

    def run(self, chosen: Sequence[str] = ()) -> list[Row]:
        """Run the chosen checks, by default all; return the rows."""
        self._began = time.monotonic()
        self._deadline = self._began + 60 * self.minutes
        checks = importlib.import_module(self.registry).CHECKS
        wanted = [c for c in checks if not chosen or c.name in chosen]
        able = [check for check in wanted if self._is_able(check)]
        for _, session in itertools.groupby(able, key=lambda check: check.session):
            left = list(session)
            while left:
                left = self._work(left)
        self._write(running="", is_finished=True)
        return self.rows

    def _is_able(self, check: Check) -> bool:
        """Return True if the packages of a check are installed; otherwise that is its row."""
        missing = [name for name in check.needs if importlib.util.find_spec(name) is None]
        if missing:
            self._add(_reason(check, SKIPPED, f"not installed: {', '.join(missing)}"))
        return not missing

    def _work(self, checks: list[Check]) -> list[Check]:
        """Run checks in one process for as long as it lives; return those that are left."""
        while checks and self._left < checks[0].seconds:
            note = f"{max(self._left, 0):.0f} s are left, it takes about {checks[0].seconds:.0f}"
            self._add(_reason(checks.pop(0), SKIPPED, note))
        if not checks:
            return []
        reading, writing = os.pipe()
        with self.output.with_suffix(".log").open("a") as log:
            process = self._start(checks, writing, log)
        os.close(writing)
        try:
            return self._follow(process, reading, checks)
        finally:
            os.close(reading)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def _start(self, checks: list[Check], pipe: int, log: IO[str]) -> subprocess.Popen[bytes]:
        order = {
            "registry": self.registry,
            "names": [check.name for check in checks],
            "kind": self.kind,
            "directory": str(self.directory),
            "model": str(self.model) if self.model else "",
        }
        module = "megatron_sr1.gpu_checks.worker"
        command = [sys.executable, "-m", module, str(pipe), str(os.getpid()), json.dumps(order)]
        return subprocess.Popen(
            command,
            stdout=log,
            stderr=log,
            pass_fds=[pipe],
            env=environment(),
            start_new_session=True,  # a group, to be killed with all that the checks start
        )

    def _follow(
        self, process: subprocess.Popen[bytes], pipe: int, checks: list[Check]
    ) -> list[Check]:
        """Take a process's messages; return the checks after the one at which it ended."""
        self._running, left = checks[0], checks[1:]
        for message in self._messages(pipe):
            if message is None:
                late = self._left <= 0
                note = f"stopped: {'the time limit is reached' if late else 'it took too long'}"
                self._add(_reason(self._running, SKIPPED if late else ERROR, note))
                return left
            if "begin" in message:
                self._running = next(c for c in checks if c.name == message["begin"])
                left = checks[checks.index(self._running) + 1 :]
                self._begun = time.monotonic()
                self._write(self._running.name)
            elif "row" in message:
                self._add(Row(**message["row"]))
            elif left and self._left < left[0].seconds:
                return left  # `_work` says so
            elif not left:
                return []
        code = process.wait()
        if code:  # the check's own row is missing
            note = f"its process ended with {code}; see {self.output.with_suffix('.log').name}"
            self._add(_reason(self._running, ERROR, note))
        return left

    def _messages(self, pipe: int) -> Iterator[dict[str, Any] | None]:
        """Yield messages until the pipe closes; None if the time of the running check is up."""
        self._begun = time.monotonic()
        held = b""
        with selectors.DefaultSelector() as waiting:
            waiting.register(pipe, selectors.EVENT_READ)
            while waiting.select(max(self._limit(), 0)):
                chunk = os.read(pipe, 2**16)
                if not chunk:
                    return
                *lines, held = (held + chunk).split(b"\n")
                yield from map(json.loads, lines)
        yield None

    def _limit(self) -> float:
        """Seconds that the running check may still take."""
        own = max(PATIENCE * self._running.seconds, LEAST_SECONDS[self.kind])
        return min(self._begun + own - time.monotonic(), self._left)

    @property
    def _left(self) -> float:
        return self._deadline - time.monotonic()

    def _add(self, row: Row) -> None:
        self.rows.append(row)
        self._write(row.check)
        self.show(row)

    def _write(self, running: str, is_finished: bool = False) -> None:
        table = {
            "kind": self.kind,
            "seconds": round(time.monotonic() - self._began, 1),
            "running": running,
            "finished": is_finished,
            "rows": [row.as_json() for row in self.rows],
        }
        write_text(self.output, json.dumps(table, indent=1) + "\n")


def _reason(check: Check, status: str, note: str) -> Row:
    """Return the row of a check that has none of its own."""
    return Row("ran to its end", status, meaning=check.meaning, note=note, check=check.name)


def environment(**more: str) -> dict[str, str]:
    """Return the environment of a process that imports the package from this checkout."""
    paths = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **more}
