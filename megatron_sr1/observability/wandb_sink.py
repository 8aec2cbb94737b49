"""Metrics and samples of a run in Weights & Biases."""

from __future__ import annotations

import os
import struct
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image

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

WANDB_ID_FILE = "wandb_id.txt"
WANDB_FILES = "WANDB_DATA_DIR"
"""Environment variable with wandb's directory for tables and images until their upload."""
HEADER_BYTES, BLOCK_BYTES = 7, 32768
FRAGMENT = struct.Struct("<IHB")
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


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
        for number, values in logged_steps(run_dir, config.stage, step):
            self.log(number, values)

    def show(self, step: int, rollouts: Rollouts, images: Images, cells: Cells) -> None:
        """Prepare the tables of samples and verdicts for `log`, if they are due."""
        chosen = chosen_samples(self._settings, step, rollouts)
        if chosen and step > self._last:
            self._tables["samples"] = self._samples(chosen, images)
            rows = [
                [f"answer {word}", cells[right, True], cells[right, False]]
                for right, word in ((True, "right"), (False, "wrong"))
            ]
            columns: list[str | int] = ["", "reading right", "reading wrong"]
            self._tables["verdicts"] = self._wandb.Table(columns=columns, data=rows)

    def show_answers(self, name: str, lines: Rollouts, images: Images) -> None:
        """Prepare a table of the first answers to a held-out set, the same questions each time."""
        if lines and self._settings.samples:
            verdicts = ("accuracy", "self_reward")
            table = self._wandb.Table(columns=["image", *TEXTS, *verdicts])
            for line in lines[: self._settings.samples]:
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
