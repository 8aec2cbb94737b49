"""The grader's other half: processes that can be killed, started when first needed.

In: two mathematical answers. Out: whether they are equal, or that the answer cannot be compared.
math-verify can hang or take all memory on sampled text; so it works in a process of its own
(mathematics.py), which is killed at the time limit. While one that is slow is waited for, a second
process loads, and takes its place if need be: the other comparisons lose the time limit once and
nothing else.
"""

from __future__ import annotations

import signal
import sys
from typing import Any, NoReturn

from megatron_sr1.errors import GradingError, GradingLimit
from megatron_sr1.rewards.process import MEMORY_BYTES, GraderProcess

START_SECONDS = 180.0
"""Importing the algebra may take so long (a second on an idle machine)."""
SLOW_SECONDS = 0.3
"""A comparison that takes so long may never end: the spare process starts."""
LEAVE_SECONDS = 0.2
"""A process that is not busy has so long to end by itself."""
CACHE_ENTRIES = 100_000
MAX_SHOWN_CHARACTERS = 200


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
