"""Where a step's numbers go beside `metrics.jsonl`: a progress bar or log lines, wandb if asked.

In: a step and its flat metrics. Only rank 0 makes sinks.
"""

from __future__ import annotations

import logging
import sys
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from megatron_sr1.config import Config
from megatron_sr1.config_file import to_dict
from megatron_sr1.errors import ConfigError

log = logging.getLogger(__name__)
WANDB_ID_FILE = "wandb_id.txt"
SHOWN = {
    "reward/total": "reward",
    "reward/accuracy": "accuracy",
    "reward/self_reward": "self-reward",
    "actor/loss": "loss",
    "time/step_seconds": "seconds",
}
"""What a line or bar shows, and under which word."""


class Sink(Protocol):
    """Takes a step's metrics."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Take the metrics of one finished step, counted from 1."""

    def close(self) -> None:
        """The run is over."""


def make_sinks(config: Config, run_dir: Path, step: int = 0) -> list[Sink]:
    """What shows a run beside its metrics file; for rank 0 alone.

    Args:
        config: of the run.
        run_dir: run directory.
        step: steps done before, when resuming.

    Raises:
        ConfigError: wandb was asked for and is not installed or cannot start.
    """
    num_steps = config.optimizer.num_steps
    sinks: list[Sink] = []
    if config.logging.progress and sys.stderr.isatty():
        sinks.append(ProgressSink(config.stage, num_steps, step))
    else:
        sinks.append(LogSink(config.stage, num_steps))
    if config.logging.wandb != "off":
        sinks.append(WandbSink(run_dir, config))
    return sinks


def shown(values: Mapping[str, float]) -> str:
    """The few numbers that a person follows, as `reward 0.71, accuracy 0.62`."""
    return ", ".join(f"{word} {values[name]:.3g}" for name, word in SHOWN.items() if name in values)


class LogSink:
    """A log line a step."""

    def __init__(self, stage: str, num_steps: int) -> None:
        """`num_steps`: of the run, shown behind the step's number."""
        self._stage, self._num_steps = stage, num_steps

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write the line."""
        log.info("%s %d/%d: %s", self._stage, step, self._num_steps, shown(values))

    def close(self) -> None:
        """Nothing to close."""


class ProgressSink:
    """A progress bar on the terminal; log lines are written above it."""

    def __init__(self, stage: str, num_steps: int, step: int) -> None:
        """Show the bar."""
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        from rich.progress import TimeRemainingColumn as Remaining

        self._bar = Progress(
            TextColumn("{task.description}"),
            *(BarColumn(), MofNCompleteColumn(), Remaining(), TextColumn("{task.fields[shown]}")),
            console=Console(stderr=True),
        )
        self._task = self._bar.add_task(stage, total=num_steps, completed=step, shown="")
        self._bar.start()
        self._point_logging()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Advance."""
        self._bar.update(self._task, completed=step, shown=shown(values))

    def close(self) -> None:
        """Leave the finished bar on the screen."""
        self._bar.stop()
        self._point_logging()

    def _point_logging(self) -> None:
        # The bar replaces sys.stderr while it shows; handlers hold on to the former one.
        for handler in logging.getLogger().handlers:
            if type(handler) is logging.StreamHandler:
                handler.setStream(sys.stderr)


class WandbSink:
    """Weights & Biases, online or into the run's folder; a resumed run keeps its id."""

    def __init__(self, run_dir: Path, config: Config) -> None:
        """Start or resume the wandb run."""
        settings = config.logging
        try:
            import wandb
        except ImportError as error:
            raise ConfigError(
                f"logging.wandb={settings.wandb}, but wandb cannot be imported ({error}); "
                "pip install wandb, or set logging.wandb=off"
            ) from None
        id_file = run_dir / WANDB_ID_FILE
        if not id_file.exists():
            id_file.write_text(uuid.uuid4().hex[:12] + "\n")
        try:
            self._run = wandb.init(
                project=settings.wandb_project,
                dir=str(run_dir),
                name=run_dir.name,
                id=id_file.read_text().strip(),
                resume="allow",
                mode="offline" if settings.wandb == "offline" else "online",
                config=to_dict(config),
            )
        except wandb.Error as error:
            raise ConfigError(
                f"logging.wandb={settings.wandb}: wandb did not start ({error}); "
                "logging.wandb=offline needs neither network nor account"
            ) from None

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log the step's metrics."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Flush and end the run."""
        self._run.finish()
