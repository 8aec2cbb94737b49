"""What the two ways of a conversion share: the sides, how they are compared, how far they are.

In: the published directory of a model and a checkpoint of it. Out: the tensors in which the two
differ, bit by bit. Neither way makes a model or imports Megatron: names, shapes and places come
from the table (units.py), and no more than a unit is in memory at a time.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_sr1.checkpoint.disk import room_text, why_not_written
from megatron_sr1.checkpoint.hf import check_tensors, with_tied_copy
from megatron_sr1.checkpoint.hf_files import HFSource
from megatron_sr1.checkpoint.transforms import Slice, disassemble
from megatron_sr1.conversion.reader import UnitReader
from megatron_sr1.conversion.units import Unit, units
from megatron_sr1.errors import CheckpointError
from megatron_sr1.model.hf_config import HFConfig, read_hf_config
from megatron_sr1.runtime.collectives import reason

# What is being done ("kept", "writing", "comparing"), bytes that are done, bytes in all.
Report = Callable[[str, int, int], None]
NUM_NAMED = 6  # tensors that an error names


@dataclass(frozen=True)
class Published:
    """The published side: a directory, or the headers of one that a checkpoint carries.

    Attributes:
        source: its tensors.
        config: shape of the model.
        units: all that there is to move.
    """

    source: HFSource
    config: HFConfig
    units: tuple[Unit, ...]

    @classmethod
    def open(cls, directory: Path) -> Published:
        """Read headers and configuration.

        Raises:
            CheckpointError: the tensors are not those of the configuration.
        """
        config, source = read_hf_config(directory), HFSource(directory)
        check_tensors(source, config)
        return cls(source, config, units(config))

    def tensors(self, unit: Unit, parameter: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """The published tensors of a unit's parameter, a tied copy included."""
        return with_tied_copy(disassemble(unit.entry, parameter), self.source, self.config)

    def num_bytes(self, parts: Iterable[Unit]) -> int:
        """Of the published tensors of some units, tied copies left out."""
        return sum(self.source.tensors[n].num_bytes for unit in parts for n in unit.entry.hf_names)


class Meter:
    """Counts what is done, and tells.

    Args:
        what: is done.
        total_bytes: to be done.
        report: is told after each tensor.
    """

    def __init__(self, what: str, total_bytes: int, report: Report) -> None:
        """Nothing is done yet."""
        self.what, self.total_bytes, self.report = what, total_bytes, report
        self.done_bytes = 0

    def keep(self, num_bytes: int) -> None:
        """So much had been done by an earlier conversion."""
        self.done_bytes += num_bytes
        if num_bytes:
            self.report("kept", num_bytes, num_bytes)

    def add(self, num_bytes: int) -> None:
        """So much more is done."""
        self.done_bytes += num_bytes
        self.report(self.what, self.done_bytes, self.total_bytes)


def differences(
    published: Published, reader: UnitReader, parts: Sequence[Unit], *, to_published: bool
) -> Iterator[str]:
    """Compare tensors bit by bit.

    Args:
        published: one side, with weights.
        reader: of the other.
        parts: to compare.
        to_published: whether the published side was made of the other; it tells which type the
            values were rounded to, where the types differ.

    Yields:
        after each unit the names of its tensors that differ, with their files, or "".
    """
    for unit in parts:
        found = []
        for name, stored in published.tensors(unit, reader.read(unit)):
            other = published.source.read(Slice(name))
            if to_published:
                stored = stored.to(other.dtype)
            else:
                other = other.to(stored.dtype)
            if not torch.equal(bits(stored), bits(other)):
                files = ", ".join(reader.files_of(unit))
                found.append(f"{name} ({published.source.tensors[name].file}; {files})")
        yield ", ".join(found)


def compare(
    published: Published, reader: UnitReader, report: Report, *, to_published: bool
) -> None:
    """Compare all tensors.

    Raises:
        CheckpointError: naming the first that differ.
    """
    meter = Meter("comparing", published.num_bytes(published.units), report)
    different = []
    found = differences(published, reader, published.units, to_published=to_published)
    for unit, names in zip(published.units, found, strict=True):
        different += [names] if names else []
        meter.add(published.num_bytes([unit]))
    if different:
        more = f"; {len(different) - NUM_NAMED} more" if len(different) > NUM_NAMED else ""
        raise CheckpointError(
            f"{published.source.directory} and {reader.folder} differ in "
            f"{'; '.join(different[:NUM_NAMED])}{more}; remove what was converted and convert again"
        )


@contextlib.contextmanager
def claimed(partial: Path) -> Iterator[None]:
    """Keep a folder that is not finished to this process.

    Raises:
        CheckpointError: another process writes to it.
    """
    partial.mkdir(parents=True, exist_ok=True)
    handle = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise CheckpointError(f"{partial}: another conversion is writing there") from None
    finally:
        os.close(handle)


@contextlib.contextmanager
def told_when_full(folder: Path, needed_bytes: int) -> Iterator[None]:
    """Turn what torch and the disk say while writing into our words."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            f"{why_not_written(folder)}{reason(error)} ({room_text(folder, needed_bytes)}); make "
            "room and start the same command again: it goes on from the last finished file"
        ) from error


def need_empty(target: Path, but: Sequence[str] = ()) -> None:
    """Refuse a target that holds something.

    Args:
        target: folder that is to be made.
        but: names in it of what an earlier conversion left.

    Raises:
        CheckpointError: it is a file, or not empty.
    """
    if target.exists() and (
        not target.is_dir() or any(p.name not in but for p in target.iterdir())
    ):
        raise CheckpointError(f"{target} is there already; name a new or an empty folder")


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's bytes, so that equal is equal, NaN included."""
    return tensor.contiguous().view(torch.uint8)
