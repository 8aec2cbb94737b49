"""The file with a run's metrics, `metrics.jsonl`, a line per step.

Names are flat: `{"step": 3, "stage": "grpo", "reward/accuracy": 0.5, …}`. A value that is not
finite is written as null, so that every line is JSON.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_sr1.runtime.files import write_text

METRICS_FILE = "metrics.jsonl"


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read the complete lines of a jsonl file, as `each_line` does."""
    return list(each_line(path))


def each_line(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the complete lines of a jsonl file one at a time; none if it does not exist.

    A last line that was truncated by a kill is skipped; a broken line elsewhere raises ValueError.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n") and line.strip():
                yield json.loads(line)


def logged_steps(run_dir: Path, stage: str, until: int) -> Iterator[tuple[int, dict[str, float]]]:
    """Yield number and metrics of a stage's steps up to `until`, as a sink receives them."""
    for line in each_line(run_dir / METRICS_FILE):
        step, of_stage = line.pop("step"), line.pop("stage")
        if of_stage == stage and step <= until:
            yield step, {name: math.nan if v is None else v for name, v in line.items()}


class MetricsFile:
    """`metrics.jsonl`: each step of a stage at most once, also after kills and resumes."""

    def __init__(self, path: Path) -> None:
        """Remove a truncated last line from the file and read each stage's last step."""
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._last: dict[str, int] = {}
        self._keep(lambda line: True)

    def append(self, step: int, stage: str, values: Mapping[str, float]) -> None:
        """Append one line and sync it to the disk.

        Raises:
            ValueError: the file already has this step of the stage (sft | grpo | eval).
        """
        if step <= self._last.get(stage, -1):
            raise ValueError(
                f"{self.path}: {stage} step {step} comes after step {self._last[stage]}; call "
                "keep_until when resuming"
            )
        line: dict[str, Any] = {"step": step, "stage": stage}
        line |= {name: float(v) if math.isfinite(v) else None for name, v in values.items()}
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
