"""Reads rows from source files: parquet, jsonl, json, or image folders with metadata.jsonl.

Each row has a name ("train.parquet row 17"). For one that cannot be read, its error is yielded, so
that the caller can count it and continue.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_sr1.data.examples import Record
from megatron_sr1.data.guards import MAX_JSON_BYTES, parse_json, printable, read_json, shown
from megatron_sr1.data.rows import record_from_row
from megatron_sr1.errors import DataError

METADATA_FILE = "metadata.jsonl"
SUFFIXES = (".parquet", ".jsonl", ".json")
MAX_SOURCE_BYTES = 4 * 2**30
"""Limit of a json file, which is read as a whole; jsonl and parquet are streamed."""
_PARQUET_ROWS = 64


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


def count_rows(files: list[Path]) -> int | None:
    """Return the number of rows according to parquet footers; None for other formats."""
    if files[0].suffix != ".parquet":
        return None
    return sum(_parquet(path).metadata.num_rows for path in files)


def records(
    files: list[Path], image_folder: Path | None, columns: Mapping[str, str]
) -> Iterator[tuple[str, Record | DataError]]:
    """Yield (name, record) for the rows of source files, or (name, error) if a row is not one.

    A file that cannot be read at all raises its error.

    Args:
        files: result of `source_files`.
        image_folder: base of relative image paths; None: the directory of each file.
        columns: as in `record_from_row`.
    """
    for path in files:
        read = {".parquet": _parquet_rows, ".jsonl": _jsonl_rows, ".json": _json_rows}[path.suffix]
        where = ""
        for where, row in read(path):
            try:
                if isinstance(row, DataError):
                    raise row
                if not isinstance(row, dict):
                    raise DataError(f"{where}: expected an object of columns")
                if path.name == METADATA_FILE:
                    row = _with_image(row, where)
                folder = image_folder or path.parent
                yield where, record_from_row(row, folder=folder, where=where, columns=columns)
            except DataError as error:
                yield where, error
        if not where:
            yield path.name, DataError(f"{path.name}: no samples in it")


def _parquet(path: Path) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path}: not readable as parquet: {printable(str(error))[:200]}") from None


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    number = 0
    batches = _parquet(path).iter_batches(batch_size=_PARQUET_ROWS)
    while True:
        try:
            batch = next(batches, None)
        except Exception as error:  # errors of pyarrow and of the codecs that it uses
            reason = printable(str(error))[:200]
            raise DataError(f"{path}: row {number} or a later one is damaged: {reason}") from None
        if batch is None:
            return
        for place in range(batch.num_rows):
            where = f"{path.name} row {number}"
            try:
                yield where, batch.slice(place, 1).to_pylist()[0]
            except Exception as error:  # text that is not UTF-8, dates out of range, extensions
                yield where, DataError(f"{where}: not readable: {printable(str(error))[:200]}")
            number += 1


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Any]]:
    with open(path, "rb") as file:
        number = 0
        while line := file.readline(MAX_JSON_BYTES + 1):
            number, length, piece = number + 1, len(line), line
            while not piece.endswith(b"\n") and (piece := file.readline(MAX_JSON_BYTES)):
                length += len(piece)  # the rest of a long line is not kept
            where = f"{path.name} line {number}"
            if length > MAX_JSON_BYTES:
                yield where, DataError(f"{where}: {length} bytes, at most {MAX_JSON_BYTES}")
            elif line.strip():
                try:
                    yield where, parse_json(line, where)
                except DataError as error:
                    yield where, error


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    values = read_json(path, MAX_SOURCE_BYTES)
    if not isinstance(values, list):
        raise DataError(f"{path}: a {type(values).__name__}; expected a list of samples")
    for number, value in enumerate(values):
        yield f"{path.name} sample {number}", value


def _with_image(row: dict[str, Any], where: str) -> dict[str, Any]:
    """Move `file_name` (or `file_names`) of a row of metadata.jsonl to `images`."""
    names = row.pop("file_names", None) or row.pop("file_name", None)
    if names is None:
        return row
    if row.get("images") or row.get("image"):
        raise DataError(f"{where}: both file_name and an image column; keep one of them")
    return {**row, "images": names}
