"""Source files to rows: parquet, jsonl, json, or a folder of images with metadata.jsonl.

In: a file or a folder. Out: rows with a name each ("train.parquet row 17"), read as a stream
where the format allows it. A row that cannot be read comes out as its error, so that the reader
of the stream can count it and go on.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_sr1.data.examples import Record, record_from_row
from megatron_sr1.errors import DataError

METADATA_FILE = "metadata.jsonl"
SUFFIXES = (".parquet", ".jsonl", ".json")
_PARQUET_ROWS = 64
Row = tuple[str, "dict[str, Any] | DataError"]


def source_files(source: Path) -> list[Path]:
    """The files that a source consists of.

    Args:
        source: one file, a folder with metadata.jsonl, or a folder of files of one kind.

    Raises:
        DataError: nothing there, an unknown suffix, or files of several kinds.
    """
    if source.is_dir():
        if (source / METADATA_FILE).is_file():
            return [source / METADATA_FILE]
        found = sorted(p for p in source.iterdir() if p.suffix in SUFFIXES)
        if len({p.suffix for p in found}) != 1:
            raise DataError(
                f"{source}: holds {[p.name for p in found[:5]]}; expected {METADATA_FILE} beside "
                f"images, or files of one kind out of {', '.join(SUFFIXES)}"
            )
        return found
    if not source.is_file():
        raise DataError(f"{source}: no such file or folder")
    if source.suffix not in SUFFIXES:
        raise DataError(f"{source}: suffix {source.suffix!r}; expected {', '.join(SUFFIXES)}")
    return [source]


def count_rows(files: list[Path]) -> int | None:
    """Rows of parquet files by their footers; None for the other kinds."""
    if files[0].suffix != ".parquet":
        return None
    return sum(_parquet(path).metadata.num_rows for path in files)


def records(
    files: list[Path], image_folder: Path | None = None
) -> Iterator[tuple[str, Record | DataError]]:
    """Records of source files, or the error in a record's place.

    Args:
        files: as `source_files` found them.
        image_folder: relative image paths start here; None: in each file's own folder.

    Yields:
        (name of the row, the record or what is wrong with it).

    Raises:
        DataError: a whole file that cannot be read.
    """
    for path in files:
        for where, row in _rows(path):
            if isinstance(row, DataError):
                yield where, row
                continue
            try:
                folder = image_folder or path.parent
                if path.name == METADATA_FILE:
                    row = _with_image(row, folder, where)
                yield where, record_from_row(row, folder=folder, where=where)
            except DataError as error:
                yield where, error


def _rows(path: Path) -> Iterator[Row]:
    if path.suffix == ".parquet":
        return _parquet_rows(path)
    return _jsonl_rows(path) if path.suffix == ".jsonl" else _json_rows(path)


def _parquet(path: Path) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not readable as parquet: {error}") from None


def _parquet_rows(path: Path) -> Iterator[Row]:
    number = 0
    for batch in _parquet(path).iter_batches(batch_size=_PARQUET_ROWS):
        for row in batch.to_pylist():
            yield f"{path.name} row {number}", row
            number += 1


def _jsonl_rows(path: Path) -> Iterator[Row]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                where = f"{path.name} line {number}"
                yield where, _object(line, where)


def _json_rows(path: Path) -> Iterator[Row]:
    try:
        values = json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(f"{path}: not JSON: {error}") from None
    if not isinstance(values, list):
        raise DataError(f"{path}: a {type(values).__name__}; expected a list of samples")
    for number, value in enumerate(values):
        where = f"{path.name} sample {number}"
        good = isinstance(value, dict)
        yield where, value if good else DataError(f"{where}: expected an object of columns")


def _object(line: bytes, where: str) -> dict[str, Any] | DataError:
    try:
        value = json.loads(line)
    except ValueError as error:
        return DataError(f"{where}: not JSON: {error}")
    return value if isinstance(value, dict) else DataError(f"{where}: expected an object")


def _with_image(row: dict[str, Any], folder: Path, where: str) -> dict[str, Any]:
    """A row of metadata.jsonl with its `file_name` (or `file_names`) as images inside `folder`."""
    names = row.pop("file_names", None) or row.pop("file_name", None)
    if names is None:
        return row
    names = names if isinstance(names, list) else [names]
    for name in names:
        if not (folder / str(name)).resolve().is_relative_to(folder.resolve()):
            raise DataError(f"{where}: file_name {name!r} leads out of {folder}")
    return {**row, "images": names}
