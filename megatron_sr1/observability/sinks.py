"""Where a step's numbers go: `metrics.jsonl` always, a progress bar or log lines, wandb if asked.

In: step, stage and flat metrics. Only rank 0 has sinks; the others get an empty list.
"""

from __future__ import annotations

import logging
import sys
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from megatron_sr1.config import LoggingConfig
from megatron_sr1.errors import ConfigError
from megatron_sr1.observability.metrics import MetricsFile

log = logging.getLogger(__name__)
METRICS_FILE = "metrics.jsonl"
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

    def log(self, step: int, stage: str, values: Mapping[str, float]) -> None:
        """Take the metrics of one finished step."""

    def close(self) -> None:
        """The run is over."""


def make_sinks(
    run_dir: Path,
    settings: LoggingConfig,
    *,
    stage: str,
    rank: int,
    num_steps: int,
    resumed_step: int | None = None,
    config: Mapping[str, Any] | None = None,
) -> list[Sink]:
    """The sinks of this rank.

    Args:
        run_dir: run directory.
        settings: the logging group.
        stage: sft | grpo | eval.
        rank: of this process; only 0 gets sinks.
        num_steps: steps of the whole run, for the progress bar.
        resumed_step: last step that counts as done; the stage's later lines in metrics.jsonl are
            dropped. None: the stage starts afresh, all its lines are dropped.
        config: resolved configuration, for wandb.

    Raises:
        ConfigError: wandb was asked for and is not installed or cannot start.
    """
    if rank != 0:
        return []
    file = MetricsFile(run_dir / METRICS_FILE)
    done = -1 if resumed_step is None else resumed_step
    file.drop_after(stage, done)
    sinks: list[Sink] = [JsonlSink(file)]
    if settings.progress and sys.stderr.isatty():
        sinks.append(ProgressSink(stage, num_steps, done + 1))
    else:
        sinks.append(LogSink(num_steps))
    if settings.wandb != "off":
        sinks.append(WandbSink(run_dir, settings, config or {}))
    return sinks


class JsonlSink:
    """Writes `metrics.jsonl`."""

    def __init__(self, file: MetricsFile) -> None:
        """Write to `file`."""
        self._file = file

    def log(self, step: int, stage: str, values: Mapping[str, float]) -> None:
        """Append a line."""
        self._file.append(step, stage, values)

    def close(self) -> None:
        """Nothing: every line is on disk already."""


def shown(values: Mapping[str, float]) -> str:
    """The few numbers that a person follows, as `reward 0.71, accuracy 0.62`."""
    return ", ".join(f"{word} {values[name]:.3g}" for name, word in SHOWN.items() if name in values)


class LogSink:
    """A log line a step."""

    def __init__(self, num_steps: int) -> None:
        """`num_steps`: of the run, shown behind the step's number."""
        self._num_steps = num_steps

    def log(self, step: int, stage: str, values: Mapping[str, float]) -> None:
        """Write the line."""
        log.info("%s %d/%d: %s", stage, step + 1, self._num_steps, shown(values))

    def close(self) -> None:
        """Nothing to close."""


class ProgressSink:
    """A progress bar on the terminal; log lines are written above it."""

    def __init__(self, stage: str, num_steps: int, first_step: int) -> None:
        """Show the bar."""
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        from rich.progress import TimeRemainingColumn as Remaining

        self._bar = Progress(
            TextColumn("{task.description}"),
            *(BarColumn(), MofNCompleteColumn(), Remaining(), TextColumn("{task.fields[shown]}")),
            console=Console(stderr=True),
        )
        self._task = self._bar.add_task(stage, total=num_steps, completed=first_step, shown="")
        self._bar.start()
        self._point_logging()

    def log(self, step: int, stage: str, values: Mapping[str, float]) -> None:
        """Advance."""
        self._bar.update(self._task, completed=step + 1, shown=shown(values))

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

    def __init__(self, run_dir: Path, settings: LoggingConfig, config: Mapping[str, Any]) -> None:
        """Start or resume the wandb run."""
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
                config=dict(config),
            )
        except wandb.Error as error:
            raise ConfigError(
                f"logging.wandb={settings.wandb}: wandb did not start ({error}); "
                "logging.wandb=offline needs neither network nor account"
            ) from None

    def log(self, step: int, stage: str, values: Mapping[str, float]) -> None:
        """Log the step's metrics."""
        self._run.log({**values, "stage": stage}, step=step)

    def close(self) -> None:
        """Flush and end the run."""
        self._run.finish()
