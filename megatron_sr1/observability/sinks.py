"""Where a step's metrics go besides `metrics.jsonl`.

A progress bar or log lines and, where configured, wandb and TensorBoard, each in a file of its own.
Only rank 0 has sinks.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from PIL import Image

from megatron_sr1.config.run import Config, LoggingConfig
from megatron_sr1.errors import ConfigError

log = logging.getLogger(__name__)
SHOWN = {
    "reward/total": "reward",
    "reward/accuracy": "accuracy",
    "reward/self_reward": "self-reward",
    "actor/loss": "loss",
    "time/step_seconds": "seconds",
}
"""Metrics in log lines and the progress bar, and their labels."""
LINE_SECONDS = 10.0
"""Least time between two log lines of steps; the first and the last step always have one."""
TEXTS = ("question", "gold", "response", "description", "reading")
REWARDS = ("accuracy", "self_reward", "total")
"""Rewards of rollouts/step_N.jsonl that are shown with samples."""
MAX_SIDE_PIXELS = 512
Rollouts = Sequence[Mapping[str, Any]]
Images = Callable[[int], Sequence[Image.Image]]
"""Index of a sample -> its RGB images."""
Cells = Mapping[tuple[bool, bool], int]
"""(answer right, reading right) -> responses, from `rewards.score.cross`."""


class Sink:
    """Shows or stores the metrics of steps; a method that is not overridden does nothing."""

    def show(self, step: int, rollouts: Rollouts, images: Images, cells: Cells) -> None:
        """Receive a step's rollouts, as in rollouts/step_N.jsonl, before its metrics."""

    def show_answers(self, name: str, lines: Rollouts, images: Images) -> None:
        """Receive the first answers to a held-out set, as in eval/NAME.jsonl, before its rates."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Receive the metrics of a finished step, counted from 1; 0 is before the first."""

    def close(self) -> None:
        """Finish at the end of the run."""


def make_sinks(config: Config, run_dir: Path, step: int = 0) -> list[Sink]:
    """Create the sinks of a run; `step` is the number of finished steps when resuming.

    Raises:
        ConfigError: wandb or TensorBoard is configured but not installed, or cannot start.
    """
    num_steps = config.num_steps
    sinks: list[Sink] = []
    if config.logging.progress and sys.stderr.isatty():
        sinks.append(ProgressSink(config.stage, num_steps, step))
    else:
        sinks.append(LogSink(config.stage, num_steps))
    if config.logging.wandb != "off":
        from megatron_sr1.observability.wandb_sink import WandbSink

        sinks.append(WandbSink(run_dir, config, step))
    if config.logging.tensorboard:
        from megatron_sr1.observability.tensorboard_sink import TensorBoardSink

        sinks.append(TensorBoardSink(run_dir, config, step))
    return sinks


def check_installed(settings: LoggingConfig) -> None:
    """Check, before anything is loaded, that the packages of the sinks are there.

    Raises:
        ConfigError: one is not.
    """
    for package, off in {"wandb": "off", "tensorboard": False}.items():
        value = getattr(settings, package)
        if value != off and find_spec(package) is None:
            raise ConfigError(
                f"logging.{package}={str(value).lower()}, but {package} is not installed; pip "
                f"install {package}, or set logging.{package}={str(off).lower()}"
            )


def shown(values: Mapping[str, float]) -> str:
    """Format the main metrics, such as `reward 0.71, accuracy 0.62`."""
    return ", ".join(f"{word} {values[name]:.3g}" for name, word in SHOWN.items() if name in values)


class LogSink(Sink):
    """Logs a line per step, or every few steps if they are short."""

    def __init__(self, stage: str, num_steps: int) -> None:
        """Store the total that is shown after the step's number."""
        self._stage, self._num_steps = stage, num_steps
        self._next_line = 0.0

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log the line if it is due."""
        if step < self._num_steps and time.monotonic() < self._next_line:
            return
        self._next_line = time.monotonic() + LINE_SECONDS
        log.info("%s %d/%d: %s", self._stage, step, self._num_steps, shown(values))


class ProgressSink(Sink):
    """Shows a progress bar on the terminal; log lines appear above it."""

    def __init__(self, stage: str, num_steps: int, step: int) -> None:
        """Show the bar."""
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        from rich.progress import TimeRemainingColumn as Remaining
        from rich.table import Column

        # In a narrow terminal the metrics are cut, not the bar and the time.
        whole, rest = Column(min_width=7, no_wrap=True), Column(ratio=1, no_wrap=True)
        self._bar = Progress(
            *(TextColumn("{task.description}"), BarColumn(bar_width=12)),
            *(MofNCompleteColumn(table_column=whole), Remaining(table_column=whole.copy())),
            TextColumn("{task.fields[shown]}", table_column=rest),
            console=Console(stderr=True),
            expand=True,
        )
        self._task = self._bar.add_task(stage, total=num_steps, completed=step, shown="")
        self._bar.start()
        self._point_logging()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Advance the bar."""
        self._bar.update(self._task, completed=step, shown=shown(values))

    def close(self) -> None:
        """Leave the finished bar on the screen."""
        self._bar.stop()
        self._point_logging()

    def _point_logging(self) -> None:
        # The bar replaces sys.stderr while it is shown, but handlers keep the previous one.
        for handler in logging.getLogger().handlers:
            if type(handler) is logging.StreamHandler:
                handler.setStream(sys.stderr)


def chosen_samples(settings: LoggingConfig, step: int, rollouts: Rollouts) -> Rollouts:
    """Return the rollouts of a step to show, evenly spaced; none if they are not due."""
    if not settings.samples or not (step == 1 or step % settings.samples_every == 0):
        return []
    return rollouts[:: max(-(-len(rollouts) // settings.samples), 1)]


def side_by_side(images: Sequence[Image.Image]) -> Image.Image | None:
    """Join images into one, each shrunk to `MAX_SIDE_PIXELS`; None without images."""
    small = [image.copy() for image in images]
    for image in small:
        image.thumbnail((MAX_SIDE_PIXELS, MAX_SIDE_PIXELS))
    if len(small) < 2:
        return small[0] if small else None
    size = sum(image.width for image in small), max(image.height for image in small)
    whole, left = Image.new("RGB", size), 0
    for image in small:
        whole.paste(image, (left, 0))
        left += image.width
    return whole
