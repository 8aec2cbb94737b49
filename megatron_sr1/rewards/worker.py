"""math-verify in a process of its own, which can be killed.

The process is started when first needed, as a fresh interpreter (a rank has threads and cannot
fork), talks in lines of JSON over pipes, and ends with its parent. One that takes too long or dies
is killed and replaced; the caller gets a `GradingError`, never a verdict.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import threading
import time
from typing import Any

from megatron_sr1.errors import GradingError

START_SECONDS = 60.0


class MathWorker:
    """Compares mathematical answers.

    Args:
        timeout_seconds: one comparison may take so long.
    """

    def __init__(self, timeout_seconds: float) -> None:
        """Start nothing yet."""
        self._timeout_seconds = timeout_seconds
        self._process: subprocess.Popen[bytes] | None = None

    def equal(self, gold: str, answer: str, name: str) -> bool:
        """Whether math-verify takes two answers for the same.

        Raises:
            GradingError: it broke or ran out of time; names the sample.
        """
        if self._process is None:
            self._start()
        reply = self._ask({"gold": gold, "answer": answer}, self._timeout_seconds)
        if reply is None:
            self.close()
            raise GradingError(
                f"{name}: grading {answer[:80]!r} against {gold[:80]!r} took longer than "
                f"{self._timeout_seconds:g} s or the grader died; raise "
                "reward.grader_timeout_seconds or mend the gold answer"
            )
        if "error" in reply:
            raise GradingError(f"{name}: grading {answer[:80]!r} broke: {reply['error']}")
        return bool(reply["equal"])

    def close(self) -> None:
        """Kill the process, if there is one."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    pipe.close()
            self._process = None

    def _start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "megatron_sr1.rewards.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        if self._ask(None, START_SECONDS) is None:
            self.close()
            raise GradingError("the grading process did not start; is math-verify installed?")

    def _ask(self, request: dict[str, str] | None, seconds: float) -> dict[str, Any] | None:
        """Send a request (None: only wait) and read the reply; None if none came in time."""
        assert self._process is not None and self._process.stdin and self._process.stdout
        try:
            if request is not None:
                self._process.stdin.write(json.dumps(request).encode() + b"\n")
                self._process.stdin.flush()
        except BrokenPipeError:
            return None
        ready, _, _ = select.select([self._process.stdout], [], [], seconds)
        line = self._process.stdout.readline() if ready else b""
        return json.loads(line) if line else None


def _serve() -> None:
    """Answer requests until the parent is gone."""
    from math_verify import parse, verify

    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not look like a reply

    def say(reply: dict[str, Any]) -> None:
        replies.write(json.dumps(reply) + "\n")
        replies.flush()

    say({"ready": True})
    for line in sys.stdin:
        request = json.loads(line)
        try:
            gold, answer = (
                parse(f"\\boxed{{{request[side]}}}", parsing_timeout=None)
                for side in ("gold", "answer")
            )
            say({"equal": verify(gold, answer, timeout_seconds=None)})
        except Exception as error:  # whatever math-verify or sympy raise is told, not scored
            say({"error": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    _serve()
