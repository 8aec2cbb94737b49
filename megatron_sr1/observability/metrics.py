"""Metrics of a run: the file that holds them, and the time of a step's phases.

In: flat names such as `reward/accuracy` and floats. Out: `metrics.jsonl`, a line per step:
`{"step": 3, "stage": "grpo", "reward/accuracy": 0.5, …}`. A value that is not finite is written
as null, so that every line is JSON.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_sr1.runtime.files import write_text

METRICS_FILE = "metrics.jsonl"


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read the complete lines of a jsonl file; none if it does not exist.

    A last line that was truncated by a kill is skipped; a broken line elsewhere raises ValueError.
    """
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n")[:-1] if line]


class MetricsFile:
    """`metrics.jsonl`: each step of a stage at most once, also after kills and resumes.

    Args:
        path: of the file; a truncated last line is removed.
    """

    def __init__(self, path: Path) -> None:
        """Repair the end of the file and read each stage's last step."""
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._last: dict[str, int] = {}
        self._keep(lambda line: True)

    def append(self, step: int, stage: str, values: Mapping[str, float]) -> None:
        """Append one line and sync it to the disk.

        Args:
            step: higher than the stage's last.
            stage: sft | grpo | eval.
            values: flat names -> numbers.

        Raises:
            ValueError: the file already has this step of the stage.
        """
        if step <= self._last.get(stage, -1):
            raise ValueError(
                f"{self.path}: {stage} step {step} comes after step {self._last[stage]}; call "
                "keep_until when resuming"
            )
        line: dict[str, Any] = {"step": step, "stage": stage}
        for name, value in values.items():
            line[name] = float(value) if math.isfinite(value) else None
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())  # as a later checkpoint will be
        self._last[stage] = step

    def keep_until(self, stage: str, step: int) -> None:
        """Remove the stage's lines after `step`."""
        self._keep(lambda line: line["stage"] != stage or line["step"] <= step)

    def _keep(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
        lines = [line for line in read_lines(self.path) if wanted(line)]
        self._last = {line["stage"]: line["step"] for line in lines}
        text = "".join(json.dumps(line) + "\n" for line in lines)
        if self.path.exists() and self.path.read_text(encoding="utf-8") != text:
            write_text(self.path, text)


class PhaseTimer:
    """Wall time of a step, by phase.

    `with timer.phase("pass1"):` adds to `time/pass1_seconds`; a nested phase counts for the
    inner one only, so that the phases of a step never sum to more than the step.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        """Start the first step."""
        self._clock = clock
        self._seconds: dict[str, float] = {}
        self._inner = [0.0]
        self._started = clock()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a block, also if it raises."""
        started = self._clock()
        self._inner.append(0.0)
        try:
            yield
        finally:
            whole = self._clock() - started
            inner = self._inner.pop()
            self._inner[-1] += whole
            self._seconds[name] = self._seconds.get(name, 0.0) + whole - inner

    def move(self, source: str, target: str, seconds: float) -> None:
        """Move `seconds` from one phase to another, at most what the first one has."""
        moved = min(max(seconds, 0.0), self._seconds.get(source, 0.0))
        self._seconds[source] = self._seconds.get(source, 0.0) - moved
        self._seconds[target] = self._seconds.get(target, 0.0) + moved

    def take(self) -> dict[str, float]:
        """Return the seconds of each phase and of the step, and start the next step."""
        now = self._clock()
        taken = {f"time/{name}_seconds": seconds for name, seconds in self._seconds.items()}
        taken["time/step_seconds"] = now - self._started
        self._seconds, self._inner, self._started = {}, [0.0], now
        return taken
