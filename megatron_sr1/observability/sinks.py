"""Where a step's metrics go besides `metrics.jsonl`: a progress bar or log lines, optionally wandb.

Only rank 0 has sinks.
"""

from __future__ import annotations

import logging
import os
import struct
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from math import nan
from pathlib import Path
from typing import Any

from PIL import Image

from megatron_sr1.config.run import Config
from megatron_sr1.errors import ConfigError
from megatron_sr1.observability.metrics import METRICS_FILE, read_lines

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
WANDB_ID_FILE = "wandb_id.txt"
WANDB_FILES = "WANDB_DATA_DIR"
"""Environment variable with wandb's directory for tables and images until their upload."""
TEXTS = ("question", "gold", "response", "description", "reading")
REWARDS = ("accuracy", "self_reward", "total")
"""Rewards of rollouts/step_N.jsonl in wandb's table of samples."""
MAX_SIDE_PIXELS = 512
HEADER_BYTES, BLOCK_BYTES = 7, 32768
FRAGMENT = struct.Struct("<IHB")
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4
Rollouts = Sequence[Mapping[str, Any]]
Images = Callable[[int], Sequence[Image.Image]]
"""Index of a sample -> its RGB images."""
Cells = Mapping[tuple[bool, bool], int]
"""(answer right, description sufficient) -> responses, from `rewards.score.cross`."""


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
        ConfigError: wandb is configured but not installed, or cannot start.
    """
    num_steps = config.num_steps
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


class WandbSink(Sink):
    """Logs to Weights & Biases, online or into the run directory; a resumed run keeps its id.

    wandb receives every step once. It writes the records of an offline run in blocks, so that
    logged steps may be missing after a kill: these are taken from `metrics.jsonl`, and those that
    it has are not logged again. They never change, even if the run is resumed with other settings.
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
        run_id = id_file.read_text().strip()
        os.environ.setdefault(WANDB_FILES, str((run_dir / "wandb").resolve()))
        self._last = last_step(run_dir, run_id) if settings.wandb == "offline" else -1
        try:
            self._run = wandb.init(
                project=settings.wandb_project,
                dir=str(run_dir),
                name=run_dir.name,
                id=run_id,
                resume="allow",
                mode="offline" if settings.wandb == "offline" else "online",
                config=asdict(config),
            )
        except wandb.Error as error:
            raise ConfigError(
                f"logging.wandb={settings.wandb}: wandb did not start ({error}); "
                "logging.wandb=offline needs neither network nor account"
            ) from None
        if settings.wandb == "online":  # the server knows the next step
            self._last = self._run.starting_step - 1
        for line in read_lines(run_dir / METRICS_FILE):
            number, stage = line.pop("step"), line.pop("stage")
            if stage == config.stage and number <= step:
                self.log(number, {k: nan if v is None else v for k, v in line.items()})

    def show(self, step: int, rollouts: Rollouts, images: Images, cells: Cells) -> None:
        """Prepare the tables of samples and verdicts for `log`, if they are due."""
        number, every = self._settings.wandb_samples, self._settings.wandb_tables_every
        if number and rollouts and step > self._last and (step == 1 or step % every == 0):
            chosen = rollouts[:: -(-len(rollouts) // number)]
            self._tables["samples"] = self._samples(chosen, images)
            rows = [
                [f"answer {word}", cells[right, True], cells[right, False]]
                for right, word in ((True, "right"), (False, "wrong"))
            ]
            columns: list[str | int] = ["", "description suffices", "description does not"]
            self._tables["verdicts"] = self._wandb.Table(columns=columns, data=rows)

    def show_answers(self, name: str, lines: Rollouts, images: Images) -> None:
        """Prepare a table of the first answers to a held-out set, the same questions each time."""
        if lines and self._settings.wandb_samples:
            verdicts = ("accuracy", "self_reward")
            table = self._wandb.Table(columns=["image", *TEXTS, *verdicts])
            for line in lines[: self._settings.wandb_samples]:
                image = self._image(images(line["index"]))
                table.add_data(image, *(line[key] for key in (*TEXTS, *verdicts)))
            self._tables[f"evaluation/{name}"] = table

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
            table.add_data(
                self._image(images(line["index"])),
                *(line[name] for name in TEXTS),
                *(line["reward"][name] for name in REWARDS),
                line["advantage"],
            )
        return table

    def _image(self, images: Sequence[Image.Image]) -> Any:
        shown = side_by_side(images)
        return None if shown is None else self._wandb.Image(shown)


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


def last_step(run_dir: Path, run_id: str) -> int:
    """Return the highest step in wandb's files of an offline run; -1 if there is none."""
    from google.protobuf.message import DecodeError
    from wandb.proto import wandb_internal_pb2

    messages: Any = wandb_internal_pb2
    last = -1
    for path in (run_dir / "wandb").glob(f"*run-*/run-{run_id}.wandb"):
        for record in records(path):
            try:
                message = messages.Record.FromString(record)
            except DecodeError:  # damaged by a loss of power
                continue
            if message.WhichOneof("record_type") == "history":
                last = max(last, message.history.step.num)
    return last


def records(path: Path) -> Iterator[bytes]:
    """Yield the complete records of a file, up to where it was truncated; wandb has no reader.

    The format is that of LevelDB's log (github.com/google/leveldb, doc/log_format.md) after a
    header of 7 bytes: blocks of 32 KiB with fragments of records, each with a checksum, length and
    kind. A record is one of wandb's protobuf messages.
    """
    data = path.read_bytes()
    position, parts = HEADER_BYTES, b""
    while position + FRAGMENT.size <= len(data):
        left = BLOCK_BYTES - position % BLOCK_BYTES
        if left < FRAGMENT.size:  # a fragment never begins in the last bytes of a block
            position += left
            continue
        _, length, kind = FRAGMENT.unpack_from(data, position)
        position += FRAGMENT.size + length
        if kind not in (FULL, FIRST, MIDDLE, LAST) or position > len(data):
            return
        fragment = data[position - length : position]
        parts = fragment if kind in (FULL, FIRST) else parts + fragment
        if kind in (FULL, LAST):
            yield parts
