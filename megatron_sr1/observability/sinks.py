"""Where a step's metrics go besides `metrics.jsonl`: a progress bar or log lines, optionally wandb.

In: a step, its flat metrics and its rollouts. Only rank 0 has sinks.
"""

from __future__ import annotations

import logging
import os
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from math import nan
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from megatron_sr1.config.loading import to_dict
from megatron_sr1.config.run import Config
from megatron_sr1.errors import ConfigError
from megatron_sr1.observability.metrics import METRICS_FILE, read_lines
from megatron_sr1.observability.wandb_files import last_step
from megatron_sr1.records import RIGHT_FROM

if TYPE_CHECKING:
    from PIL import Image

log = logging.getLogger(__name__)
WANDB_ID_FILE = "wandb_id.txt"
WANDB_FILES = "WANDB_DATA_DIR"
"""Environment variable with wandb's directory for tables and images until their upload."""
SHOWN = {
    "reward/total": "reward",
    "reward/accuracy": "accuracy",
    "reward/self_reward": "self-reward",
    "actor/loss": "loss",
    "time/step_seconds": "seconds",
}
"""Metrics in log lines and the progress bar, and their labels."""
TEXTS = ("question", "gold", "response", "description", "reading")
LINE_SECONDS = 10.0
"""Least time between two log lines of steps; the first and the last step always have one."""
REWARDS = ("accuracy", "self_reward", "total")
"""Rewards of rollouts/step_N.jsonl in wandb's table of samples."""
MAX_SIDE_PIXELS = 512
Rollouts = Sequence[Mapping[str, Any]]
Images = Callable[[int], "Sequence[Image.Image]"]


class Sink(Protocol):
    """Shows or stores the metrics of steps."""

    def show(self, step: int, rollouts: Rollouts, images: Images) -> None:
        """Receive a step's rollouts, before its metrics.

        Args:
            step: counted from 1.
            rollouts: as in rollouts/step_N.jsonl.
            images: index of an example -> its images.
        """

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Receive the metrics of a finished step, counted from 1."""

    def close(self) -> None:
        """Finish at the end of the run."""


def make_sinks(config: Config, run_dir: Path, step: int = 0) -> list[Sink]:
    """Create the sinks of a run, on rank 0 only.

    Args:
        config: of the run.
        run_dir: run directory.
        step: finished steps, when resuming; `metrics.jsonl` holds them already.

    Raises:
        ConfigError: wandb is configured but not installed, or cannot start.
    """
    num_steps = config.optimizer.num_steps
    sinks: list[Sink] = []
    if config.logging.progress and sys.stderr.isatty():
        sinks.append(ProgressSink(config.stage, num_steps, step))
    else:
        sinks.append(LogSink(config.stage, num_steps))
    if config.logging.wandb != "off":
        sinks.append(WandbSink(run_dir, config, step))
    return sinks


def shown(values: Mapping[str, float]) -> str:
    """Format the main metrics, such as `reward 0.71, accuracy 0.62`."""
    return ", ".join(f"{word} {values[name]:.3g}" for name, word in SHOWN.items() if name in values)


class LogSink:
    """Logs a line per step, or every few steps if they are short."""

    def __init__(self, stage: str, num_steps: int) -> None:
        """Store the total that is shown after the step's number."""
        self._stage, self._num_steps = stage, num_steps
        self._next_line = 0.0

    def show(self, step: int, rollouts: Rollouts, images: Images) -> None:
        """Do nothing."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log the line if it is due."""
        if step < self._num_steps and time.monotonic() < self._next_line:
            return
        self._next_line = time.monotonic() + LINE_SECONDS
        log.info("%s %d/%d: %s", self._stage, step, self._num_steps, shown(values))

    def close(self) -> None:
        """Do nothing."""


class ProgressSink:
    """Shows a progress bar on the terminal; log lines appear above it."""

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

    def show(self, step: int, rollouts: Rollouts, images: Images) -> None:
        """Do nothing."""

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


class WandbSink:
    """Logs to Weights & Biases, online or into the run directory; a resumed run keeps its id.

    wandb receives every step once: after a kill, steps that it has are not logged again, and steps
    that it had not written are taken from `metrics.jsonl`. Steps that it has never change, even if
    the run is resumed with other settings.
    """

    def __init__(self, run_dir: Path, config: Config, step: int = 0) -> None:
        """Start or resume the wandb run; `step` is the number of finished steps."""
        settings = config.logging
        try:
            import wandb
        except ImportError as error:
            raise ConfigError(
                f"logging.wandb={settings.wandb}, but wandb cannot be imported ({error}); "
                "pip install wandb, or set logging.wandb=off"
            ) from None
        self._wandb, self._settings, self._tables = wandb, settings, dict[str, Any]()
        id_file = run_dir / WANDB_ID_FILE
        if not id_file.exists() or not id_file.read_text().strip():
            id_file.write_text(uuid.uuid4().hex[:12] + "\n")
        os.environ.setdefault(WANDB_FILES, str((run_dir / "wandb").resolve()))
        run_id, is_offline = id_file.read_text().strip(), settings.wandb == "offline"
        self._last = last_step(run_dir, run_id, _history_step) if is_offline else 0
        try:
            self._run = wandb.init(
                project=settings.wandb_project,
                dir=str(run_dir),
                name=run_dir.name,
                id=run_id,
                resume="allow",
                mode="offline" if is_offline else "online",
                config=to_dict(config),
            )
        except wandb.Error as error:
            raise ConfigError(
                f"logging.wandb={settings.wandb}: wandb did not start ({error}); "
                "logging.wandb=offline needs neither network nor account"
            ) from None
        if not is_offline:  # the server knows the next step
            self._last = self._run.starting_step - 1
        for line in read_lines(run_dir / METRICS_FILE):
            if line["stage"] == config.stage and line["step"] <= step:
                values = {k: v for k, v in line.items() if k not in ("step", "stage")}
                self.log(line["step"], {k: nan if v is None else v for k, v in values.items()})

    def show(self, step: int, rollouts: Rollouts, images: Images) -> None:
        """Prepare the tables of samples and verdicts for `log`, if they are due."""
        number, every = self._settings.wandb_samples, self._settings.wandb_tables_every
        if number and rollouts and step > self._last and (step == 1 or step % every == 0):
            chosen = rollouts[:: -(-len(rollouts) // number)]
            self._tables = {"samples": self._samples(chosen, images)}
            columns, rows = verdict_table(rollouts)
            self._tables["verdicts"] = self._wandb.Table(columns=columns, data=rows)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log the step's metrics and tables, unless wandb has them."""
        if step > self._last:
            # Without commit, wandb would wait for the next step.
            self._run.log({**values, **self._tables}, step=step, commit=True)
            self._last = step
        self._tables = {}

    def close(self) -> None:
        """Flush and end the run."""
        self._run.finish()

    def _samples(self, rollouts: Rollouts, images: Images) -> Any:
        """Return a table with a row per rollout, its images side by side."""
        table = self._wandb.Table(columns=["image", *TEXTS, *REWARDS, "advantage"])
        for line in rollouts:
            shown = side_by_side(images(line["index"]))
            table.add_data(
                None if shown is None else self._wandb.Image(shown),
                *(line[name] for name in TEXTS),
                *(line["reward"][name] for name in REWARDS),
                line["advantage"],
            )
        return table


def side_by_side(images: Sequence[Image.Image]) -> Image.Image | None:
    """Join images into one, each shrunk to `MAX_SIDE_PIXELS`; None without images."""
    from PIL import Image

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


def verdict_table(rollouts: Rollouts) -> tuple[list[str | int], list[list[Any]]]:
    """Count responses by right or wrong answer x sufficient or insufficient description.

    Responses without a second pass are skipped. Returns columns and rows.
    """
    rewards = [line["reward"] for line in rollouts if line["reward"]["self_reward"] is not None]
    cells = [(r["accuracy"] >= RIGHT_FROM, r["self_reward"] >= RIGHT_FROM) for r in rewards]
    rows: list[list[Any]] = [
        [f"answer {word}", cells.count((right, True)), cells.count((right, False))]
        for right, word in ((True, "right"), (False, "wrong"))
    ]
    return ["", "description suffices", "description does not"], rows


def _history_step(record: bytes) -> int | None:
    """Return the step of a wandb record, or None if it holds no metrics of a step."""
    from google.protobuf.message import DecodeError
    from wandb.proto import wandb_internal_pb2

    messages: Any = wandb_internal_pb2
    try:
        message = messages.Record.FromString(record)
    except DecodeError:  # damaged by a loss of power
        return None
    return message.history.step.num if message.WhichOneof("record_type") == "history" else None
