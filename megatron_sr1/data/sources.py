"""Reads the rows of a data set one after the other, without interpreting their columns.

In: a parquet, jsonl or json file, a directory of them, a directory of images with metadata.jsonl,
or `hf:OWNER/NAME[:CONFIG]@SPLIT`, a data set of the Hugging Face hub, which the `datasets` library
reads in place. Out: `Row`s, each with a name for messages ("train.parquet row 17"). What is wrong
with a row is its value, a `DataError`; a file that cannot be read at all raises one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from megatron_sr1.data.guards import (
    MAX_JSON_BYTES,
    located,
    parse_json,
    printable,
    read_json,
    shown,
)
from megatron_sr1.errors import DataError
from megatron_sr1.runtime.hub import HUB_NAME, snapshot

METADATA_FILE = "metadata.jsonl"
SUFFIXES = (".parquet", ".jsonl", ".json")
MAX_SOURCE_BYTES = 4 * 2**30
"""Limit of a json file, which is read as a whole; jsonl and parquet are streamed."""
HUB_PREFIX = "hf:"
_HUB_SOURCE = re.compile(rf"({HUB_NAME.pattern})(?::([^@:/]+))?@([\w.-]+)")


class Row(NamedTuple):
    """A row as it was read.

    Attributes:
        where: name of the row.
        folder: base of relative image paths.
        value: columns; bytes: a line of jsonl, not parsed yet; a DataError: what is wrong.
        names_files: a row of metadata.jsonl, whose `file_name` is an image.
    """

    where: str
    folder: Path
    value: Any
    names_files: bool = False

    def columns(self) -> dict[str, Any]:
        """Return the columns, of a row of metadata.jsonl with its images; raise DataError."""
        value = parse_json(self.value) if isinstance(self.value, bytes) else self.value
        if isinstance(value, DataError):
            raise value
        if not isinstance(value, dict):
            raise DataError("expected an object of columns")
        return _with_image(value) if self.names_files else value


@dataclass(frozen=True)
class Source:
    """A data set to read.

    Attributes:
        identity: JSON value that differs for other contents; the sizes and times of files.
        num_rows: None if it is not known before they are read.
        rows: yields the rows after as many first ones.
    """

    identity: Any
    num_rows: int | None
    rows: Callable[[int], Iterator[Row]]


def open_source(text: str, revision: str = "main") -> Source:
    """Open a file, a directory, or a data set of the hub at a revision, which is downloaded.

    Raises:
        DataError: no such file, or none that can be read.
        ConfigError: a data set that cannot be downloaded.
    """
    if text.startswith(HUB_PREFIX):
        return _hub_source(text, revision)
    files = source_files(Path(text))
    facts = [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    is_parquet = files[0].suffix == ".parquet"
    num_rows = sum(map(_num_rows, files)) if is_parquet else None

    def rows(skip: int) -> Iterator[Row]:
        for path in files:
            if is_parquet and 0 < _num_rows(path) <= skip:
                skip -= _num_rows(path)
                continue
            for row in _file_rows(path):
                if skip:
                    skip -= 1
                else:
                    yield row

    return Source(facts, num_rows, rows)


def source_files(source: Path) -> list[Path]:
    """Return the files of a file, a directory with metadata.jsonl, or one of files of one kind."""
    if (source / METADATA_FILE).is_file():
        return [source / METADATA_FILE]
    found = [source]
    if source.is_dir():
        found = sorted(p for p in source.iterdir() if p.suffix in SUFFIXES)
        if len({p.suffix for p in found}) != 1:
            raise DataError(
                f"{source}: holds {shown([p.name for p in found])}; expected {METADATA_FILE} "
                f"beside images, or files of one kind out of {', '.join(SUFFIXES)}"
            )
    elif source.exists() and source.suffix not in SUFFIXES:
        raise DataError(f"{source}: suffix {source.suffix!r}; expected {', '.join(SUFFIXES)}")
    odd = [p.name for p in found if not p.is_file()]
    if odd:
        raise DataError(f"{source}: {shown(odd)}: no such file, or not a regular file")
    return found


def _file_rows(path: Path) -> Iterator[Row]:
    read = {".parquet": _parquet_rows, ".jsonl": jsonl_rows, ".json": _json_rows}[path.suffix]
    where = ""
    for where, value in read(path):
        yield Row(where, path.parent, value, path.name == METADATA_FILE)
    if not where:
        yield Row(path.name, path.parent, DataError("no samples in it"))


def _num_rows(path: Path) -> int:
    return int(_parquet(path).metadata.num_rows)


def _parquet(path: Path) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path}: not readable as parquet: {printable(error)}") from None


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    number = 0
    batches = _parquet(path).iter_batches(batch_size=64)
    while True:
        try:
            batch = next(batches, None)
        except Exception as error:  # errors of pyarrow and of the codecs that it uses
            reason = f"row {number} or a later one is damaged: {printable(error)}"
            raise DataError(f"{path}: {reason}") from None
        if batch is None:
            return
        for place in range(batch.num_rows):
            where = f"{path.name} row {number}"
            try:
                yield where, batch.slice(place, 1).to_pylist()[0]
            except Exception as error:  # text that is not UTF-8, dates out of range, extensions
                yield where, DataError(f"not readable: {printable(error)}")
            number += 1


def jsonl_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the name of each line that is not blank, and its bytes or a DataError."""
    with open(path, "rb") as file:
        number = 0
        while line := file.readline(MAX_JSON_BYTES + 1):
            number, length, piece = number + 1, len(line), line
            while not piece.endswith(b"\n") and (piece := file.readline(MAX_JSON_BYTES)):
                length += len(piece)  # the rest of a long line is not kept
            where = f"{path.name} line {number}"
            if length > MAX_JSON_BYTES:
                yield where, DataError(f"{length} bytes, at most {MAX_JSON_BYTES}")
            elif line.strip():
                yield where, line


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    values = read_json(path, MAX_SOURCE_BYTES)
    if not isinstance(values, list):
        raise DataError(f"{path}: a {type(values).__name__}; expected a list of samples")
    for number, value in enumerate(values):
        yield f"{path.name} sample {number}", value


def _with_image(row: dict[str, Any]) -> dict[str, Any]:
    """Move `file_name` (or `file_names`) of a row of metadata.jsonl to `images`."""
    names = row.pop("file_names", None) or row.pop("file_name", None)
    if names is None:
        return row
    if row.get("images") or row.get("image"):
        raise DataError("both file_name and an image column; keep one of them")
    return {**row, "images": names}


def _hub_source(text: str, revision: str) -> Source:
    """Open a split of a data set of the hub: its snapshot, read in place by `datasets`."""
    parts = _HUB_SOURCE.fullmatch(text.removeprefix(HUB_PREFIX))
    if parts is None:
        expected = f"expected {HUB_PREFIX}OWNER/NAME@SPLIT or {HUB_PREFIX}OWNER/NAME:CONFIG@SPLIT"
        raise DataError(f"{text}: {expected}, such as {HUB_PREFIX}OWNER/NAME@train")
    name, config, split = parts.groups()
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"{text}: the library datasets is not installed; pip install 'megatron_sr1[hub]', or "
            "pip install datasets"
        ) from None
    directory = snapshot(name, revision, "dataset")
    with located(text):
        datasets.disable_progress_bars()
        try:
            splits = datasets.load_dataset(str(directory), config, streaming=True)
        except Exception as error:  # the library's, of any kind
            raise DataError(f"not readable by datasets: {printable(error, 400)}") from None
        if split not in splits:
            raise DataError(f"no split {split!r}; it has {', '.join(map(str, splits))}")
    data = splits[split].decode(False)  # images as files
    known = (data.info.splits or {}).get(split)

    def rows(skip: int) -> Iterator[Row]:
        number, source = skip, iter(data.skip(skip))
        while True:
            try:
                value = next(source, None)
            except Exception as error:  # of the library, or of the format's below it
                reason = f"row {number} or a later one is not readable: {printable(error)}"
                raise DataError(f"{text}: {reason}") from None
            if value is None:
                break
            yield Row(f"{name}@{split} row {number}", directory, value)
            number += 1
        if known and known.num_examples and number != known.num_examples:
            said = f"its card says {known.num_examples}; download it again"
            raise DataError(f"{text}: {number} rows in {directory}, {said}")

    identity = [name, config, split, directory.name]
    return Source(identity, known.num_examples or None if known else None, rows)
