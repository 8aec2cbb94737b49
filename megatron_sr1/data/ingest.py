"""Makes shards from the rows of a source, in one process or in several, and continues after a stop.

One process reads and writes; rows are parsed, images verified and samples encoded by `workers`
processes, in batches. The order is that of the rows and everything that is written follows from the
source and the settings alone, so that neither the number of processes nor interruptions change a
byte. After each shard `dataset.json` says how far the reading was.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from megatron_sr1.data.benchmarks import BENCHMARKS
from megatron_sr1.data.examples import Record
from megatron_sr1.data.guards import located
from megatron_sr1.data.rows import ALPACA_GAPS, record_from_row
from megatron_sr1.data.shards import Files, encode, interrupted, write_files
from megatron_sr1.data.sources import Row, Source
from megatron_sr1.data.tally import Length, Tally
from megatron_sr1.errors import DataError, SR1Error
from megatron_sr1.runtime.signals import end_with

BATCH_ROWS = 16
"""Rows that a process converts at a time; images of some megabytes each must fit into memory."""
BATCHES_PER_WORKER = 3
"""Batches read ahead, or finished and not yet written."""


class Converted(NamedTuple):
    """What became of a row.

    Attributes:
        where: name of the row.
        files: the sample's; None: its prompt is too long or, without a length, it is not in the
            benchmark; a DataError: why it cannot be used.
        has_images: whether the sample has any.
        length: tokens of its prompt, if they were counted.
    """

    where: str
    files: Files | None | DataError
    has_images: bool = False
    length: Length | None = None


@dataclass(frozen=True)
class Conversion:
    """How rows become samples.

    Attributes:
        image_folder: base of relative image paths; None: the directory of the row's file.
        columns: name -> location, as in `record_from_row`.
        alpaca_gap: text between alpaca's instruction and input.
        measure: returns the length of a record's prompt; None: prompts are not measured.
        max_prompt_tokens: limit of measured prompts; None: no limit.
        benchmark: name of the published set whose rows they are; empty: of none.
    """

    image_folder: Path | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    alpaca_gap: str = ALPACA_GAPS["blank-line"]
    measure: Callable[[Record], Length] | None = None
    max_prompt_tokens: int | None = None
    benchmark: str = ""

    def __call__(self, rows: Sequence[Row]) -> list[Converted]:
        """Convert some rows, in order."""
        return [self._convert(row) for row in rows]

    def _convert(self, row: Row) -> Converted:
        try:
            with located(row.where):
                folder, columns = self.image_folder or row.folder, row.columns()
                if self.benchmark:
                    question = BENCHMARKS[self.benchmark].row(columns)
                    if question is None:
                        return Converted(row.where, None)
                    columns = question
                record = record_from_row(columns, folder, self.columns, self.alpaca_gap)
                length = None if self.measure is None else self.measure(record)
                limit = self.max_prompt_tokens
                if length is not None and limit is not None and sum(length) > limit:
                    return Converted(row.where, None, bool(record.images), length)
                return Converted(row.where, encode(record), bool(record.images), length)
        except DataError as error:
            return Converted(row.where, error)


def make_shards(
    source: Source,
    target: Path,
    convert: Conversion,
    tally: Tally,
    *,
    limit: int = 0,
    samples_per_shard: int = 1000,
    workers: int = 1,
    watch: Callable[[Tally], None] = lambda tally: None,
) -> int:
    """Convert a source to shards and return the number of samples.

    A call that was interrupted, with the same source and settings, is continued after its last
    whole shard. More workers and another limit of skipped rows are the same settings.

    Args:
        source: what to read.
        target: directory for the shards.
        convert: how rows become samples.
        tally: counts the rows; its limit of skipped ones is checked at the end.
        limit: number of samples to stop after; 0: none.
        samples_per_shard: samples of each shard but the last.
        workers: processes that convert; 1: this one.
        watch: called after each row, and once before.

    Raises:
        DataError: a file cannot be read, too many rows were skipped, or no sample is left.
    """
    settings = [source.identity, repr(convert), limit, samples_per_shard]
    mark = hashlib.sha256(json.dumps(settings).encode()).hexdigest()
    shards, state = interrupted(target)
    if state and state["settings"] == mark:
        tally.restore(state["tally"])
        if shards:
            tally.say(f"continuing after {tally.given:,} samples in {len(shards)} whole shards")
    else:
        shards = []
    watch(tally)
    rows = source.rows(tally.rows) if not limit or tally.given < limit else iter(())
    good = _good(_converted(rows, convert, workers), tally, limit, watch)

    def saved() -> dict[str, object]:
        return {"settings": mark, "tally": tally.state()}

    return write_files(good, target, samples_per_shard, shards, saved)


def _good(
    found: Iterator[Converted], tally: Tally, limit: int, watch: Callable[[Tally], None]
) -> Iterator[Files]:
    """Yield the samples of the rows that can be used, and count all.

    Above the limit of skipped rows nothing is yielded, but all is still read, and `Tally.check`
    raises at the end.
    """
    for each in found:
        tally.rows += 1
        if each.length is not None:
            tally.lengths[each.length] += 1
        if isinstance(each.files, DataError):
            tally.add_fault(each.where, each.files)
        elif each.files is None:
            tally.too_long += each.length is not None
        elif tally.limit.endswith("%") or not tally.too_many():
            tally.given += 1
            tally.with_images += each.has_images
            yield each.files
        watch(tally)
        if limit and tally.given == limit:
            break
    tally.check()


def _converted(rows: Iterator[Row], convert: Conversion, workers: int) -> Iterator[Converted]:
    """Convert rows in order; an error of the reading is raised after the rows before it."""
    batches = _batches(rows)
    if workers == 1:
        for batch in batches:
            if isinstance(batch, SR1Error):
                raise batch
            yield from convert(batch)
        return
    spawn = multiprocessing.get_context("spawn")  # a fork would copy pyarrow's threads' locks
    pool = ProcessPoolExecutor(workers, spawn, initializer=_join, initargs=(os.getpid(),))
    try:
        for each in _submitted(pool, convert, batches, workers * BATCHES_PER_WORKER):
            if isinstance(each, SR1Error):
                raise each
            yield from each.result()
    except BrokenProcessPool:
        advice = "start again to continue, with fewer --workers if memory was short"
        raise DataError(f"a process that converts rows was killed; {advice}") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _submitted(
    pool: ProcessPoolExecutor,
    convert: Conversion,
    batches: Iterator[list[Row] | SR1Error],
    ahead: int,
) -> Iterator[Future[list[Converted]] | SR1Error]:
    """Yield the results to come of batches in their order, having submitted some `ahead`."""
    pending: deque[Future[list[Converted]] | SR1Error] = deque()
    for batch in batches:
        pending.append(batch if isinstance(batch, SR1Error) else pool.submit(convert, batch))
        if len(pending) > ahead:
            yield pending.popleft()
    yield from pending


def _batches(rows: Iterator[Row]) -> Iterator[list[Row] | SR1Error]:
    """Yield rows in batches, and at last the error that ended the reading, if one did."""
    batch: list[Row] = []
    try:
        for row in rows:
            batch.append(row)
            if len(batch) == BATCH_ROWS:
                yield batch
                batch = []
    except SR1Error as error:
        yield from [batch] if batch else []
        yield error
        return
    if batch:
        yield batch


def _join(parent: int) -> None:
    """Prepare a process that converts: it ends with its parent, and Ctrl-C is the parent's."""
    end_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.update({"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"})
