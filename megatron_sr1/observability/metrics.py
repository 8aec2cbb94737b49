"""Numbers of a run: the file that holds them, the time of a step's phases.

In: flat names such as `reward/accuracy` and floats. Out: `metrics.jsonl`, a line a step:
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
    """The complete lines of a jsonl file; none if it is absent.

    A last line that a kill cut short is left out; a broken line elsewhere raises ValueError.
    """
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n")[:-1] if line]


class MetricsFile:
    """`metrics.jsonl`: every step of a stage at most once, whatever was killed and resumed.

    Args:
        path: of the file; a line cut short by a kill is removed from its end.
    """

    def __init__(self, path: Path) -> None:
        """Mend the file's end and remember each stage's last step."""
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._last: dict[str, int] = {}
        self._keep(lambda line: True)

    def append(self, step: int, stage: str, values: Mapping[str, float]) -> None:
        """Write one line and bring it to the disk.

        Args:
            step: higher than the stage's last.
            stage: sft | grpo | eval.
            values: flat names -> numbers.

        Raises:
            ValueError: the stage's step is there already.
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
            os.fsync(file.fileno())  # as a checkpoint is that comes after it
        self._last[stage] = step

    def keep_until(self, stage: str, step: int) -> None:
        """Forget the stage's lines with a higher step than `step`, the last that is kept."""
        self._keep(lambda line: line["stage"] != stage or line["step"] <= step)

    def _keep(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
        lines = [line for line in read_lines(self.path) if wanted(line)]
        self._last = {line["stage"]: line["step"] for line in lines}
        text = "".join(json.dumps(line) + "\n" for line in lines)
        if self.path.exists() and self.path.read_text(encoding="utf-8") != text:
            write_text(self.path, text)


class PhaseTimer:
    """Wall time of a step, by phase.

    `with timer.phase("pass1"):` adds to `time/pass1_seconds`; a phase inside a phase counts for
    the inner one only, so that the phases of a step never sum to more than the step.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        """Start the first step."""
        self._clock = clock
        self._seconds: dict[str, float] = {}
        self._inner = [0.0]
        self._started = clock()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a block, also when it raises."""
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
        """Count `seconds` of phase `source` as `target`'s, at most what `source` has."""
        moved = min(max(seconds, 0.0), self._seconds.get(source, 0.0))
        self._seconds[source] = self._seconds.get(source, 0.0) - moved
        self._seconds[target] = self._seconds.get(target, 0.0) + moved

    def take(self) -> dict[str, float]:
        """Seconds by phase and of the whole step, as metrics; the next step starts."""
        now = self._clock()
        taken = {f"time/{name}_seconds": seconds for name, seconds in self._seconds.items()}
        taken["time/step_seconds"] = now - self._started
        self._seconds, self._inner, self._started = {}, [0.0], now
        return taken
