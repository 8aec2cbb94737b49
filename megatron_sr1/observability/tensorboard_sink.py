"""Metrics and samples of a run for TensorBoard, in `tensorboard/` of the run directory.

Each start writes an event file of its own. It begins with the step from which TensorBoard drops
what earlier files have, so that steps that are done again after a kill are there once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sr1.config.run import Config
from megatron_sr1.errors import ConfigError
from megatron_sr1.observability.metrics import logged_steps
from megatron_sr1.observability.sinks import (
    REWARDS,
    TEXTS,
    Cells,
    Images,
    Rollouts,
    Sink,
    chosen_samples,
    side_by_side,
)

DIRECTORY = "tensorboard"
VERDICTS = ("accuracy", "self_reward")


class TensorBoardSink(Sink):
    """Writes scalars of all metrics, and samples as an image and a text each.

    Every step is flushed, so a kill loses none that a checkpoint contains.
    """

    def __init__(self, run_dir: Path, config: Config, step: int = 0) -> None:
        """Open an event file; `step` is the number of finished steps when resuming.

        A directory without event files, as of a run that did not write them before, gets the
        finished steps from `metrics.jsonl`.

        Raises:
            ConfigError: the package tensorboard is not installed.
        """
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                f"logging.tensorboard=true, but tensorboard cannot be imported ({error}); "
                "pip install tensorboard, or set logging.tensorboard=false"
            ) from None
        self._settings = config.logging
        self._samples: list[tuple[str, str, np.ndarray | None]] = []
        directory = run_dir / DIRECTORY
        is_new = not any(directory.glob("events.out.*"))
        # Without a checkpoint step 0, an evaluation at the start, is done again, too.
        self._writer: Any = SummaryWriter(str(directory), purge_step=step + 1 if step else 0)
        if is_new:
            self._writer.add_text("configuration", _as_code(json.dumps(asdict(config), indent=2)))
            for number, values in logged_steps(run_dir, config.stage, step):
                self._add_scalars(number, values)

    def show(self, step: int, rollouts: Rollouts, images: Images, cells: Cells) -> None:
        """Prepare the step's samples for `log`, if they are due."""
        for number, line in enumerate(chosen_samples(self._settings, step, rollouts), start=1):
            facts = {name: line["reward"][name] for name in REWARDS}
            facts |= {"advantage": line["advantage"]}
            self._add(f"samples/{number}", line, facts, images)

    def show_answers(self, name: str, lines: Rollouts, images: Images) -> None:
        """Prepare the first answers to a held-out set, the same questions each time."""
        for number, line in enumerate(lines[: self._settings.samples], start=1):
            facts = {verdict: line[verdict] for verdict in VERDICTS}
            self._add(f"evaluation/{name}/{number}", line, facts, images)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write the step's metrics and samples."""
        self._add_scalars(step, values)
        for tag, text, image in self._samples:
            self._writer.add_text(tag, text, step)
            if image is not None:
                self._writer.add_image(tag, image, step, dataformats="HWC")
        self._samples = []
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()

    def _add_scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def _add(
        self, tag: str, line: Mapping[str, Any], facts: Mapping[str, Any], images: Images
    ) -> None:
        parts = {name: line[name] for name in TEXTS} | dict(facts)
        text = "\n\n".join(f"{name}:\n{value}" for name, value in parts.items())
        image = side_by_side(images(line["index"]))
        self._samples.append((tag, _as_code(text), None if image is None else np.asarray(image)))


def _as_code(text: str) -> str:
    """Return Markdown that shows a text as it is: TensorBoard renders texts."""
    return "".join(f"    {line}\n" for line in text.splitlines())
