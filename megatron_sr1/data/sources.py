"""Reads rows from source files: parquet, jsonl, json, or image folders with metadata.jsonl.

In: a file or a directory. Out: rows with a name each ("train.parquet row 17"), streamed if the
format allows it. For a row that cannot be read, its error is yielded, so that the caller can count
it and continue.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from megatron_sr1.data.examples import Record
from megatron_sr1.data.guards import MAX_JSON_BYTES, parse_json, printable, read_file, shown
from megatron_sr1.data.rows import record_from_row
from megatron_sr1.errors import DataError

METADATA_FILE = "metadata.jsonl"
SUFFIXES = (".parquet", ".jsonl", ".json")
MAX_SOURCE_BYTES = 4 * 2**30
"""Limit of a json file, which is read as a whole; jsonl and parquet are streamed."""
_PARQUET_ROWS = 64
Row = tuple[str, "dict[str, Any] | DataError"]


def source_files(source: Path) -> list[Path]:
    """Return the files of a source.

    Args:
        source: a file, a directory with metadata.jsonl, or a directory of files of one kind.

    Raises:
        DataError: no files, an unknown suffix, or files of several kinds.
    """
    if source.is_dir():
        if (source / METADATA_FILE).is_file():
            return [source / METADATA_FILE]
        found = sorted(p for p in source.iterdir() if p.suffix in SUFFIXES)
        if len({p.suffix for p in found}) != 1:
            raise DataError(
                f"{source}: holds {shown([p.name for p in found])}; expected {METADATA_FILE} "
                f"beside images, or files of one kind out of {', '.join(SUFFIXES)}"
            )
        odd = [p.name for p in found if not p.is_file()]
        if odd:
            raise DataError(f"{source}: {shown(odd)}: not a regular file; move it elsewhere")
        return found
    if not source.is_file():
        raise DataError(f"{source}: no such file or directory")
    if source.suffix not in SUFFIXES:
        raise DataError(f"{source}: suffix {source.suffix!r}; expected {', '.join(SUFFIXES)}")
    return [source]


def count_rows(files: list[Path]) -> int | None:
    """Return the number of rows according to parquet footers; None for other formats."""
    if files[0].suffix != ".parquet":
        return None
    return sum(_parquet(path).metadata.num_rows for path in files)


def records(
    files: list[Path],
    image_folder: Path | None = None,
    columns: Mapping[str, str] | None = None,
) -> Iterator[tuple[str, Record | DataError]]:
    """Yield the records of source files, or the error of each row that is not one.

    Args:
        files: result of `source_files`.
        image_folder: base of relative image paths; None: the directory of each file.
        columns: name -> column or dotted path in a row, for columns with other names.

    Yields:
        (name of the row, the record or its error).

    Raises:
        DataError: a file cannot be read at all.
    """
    for path in files:
        for where, row in _rows(path):
            if isinstance(row, DataError):
                yield where, row
                continue
            try:
                folder = image_folder or path.parent
                if path.name == METADATA_FILE:
                    row = _with_image(row, where)
                yield where, record_from_row(row, folder=folder, where=where, columns=columns)
            except DataError as error:
                yield where, error


def _rows(path: Path) -> Iterator[Row]:
    read = {".parquet": _parquet_rows, ".jsonl": _jsonl_rows, ".json": _json_rows}[path.suffix]
    number = -1
    for number, row in enumerate(read(path)):  # noqa: B007
        yield row
    if number < 0:
        yield path.name, DataError(f"{path.name}: no samples in it")


def _parquet(path: Path) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path}: not readable as parquet: {printable(str(error))[:200]}") from None


def _parquet_rows(path: Path) -> Iterator[Row]:
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
            yield _parquet_row(batch, place, f"{path.name} row {number}")
            number += 1


def _parquet_row(batch: Any, place: int, where: str) -> Row:
    try:
        return where, batch.slice(place, 1).to_pylist()[0]
    except Exception as error:  # text that is not UTF-8, dates out of range, extension types
        reason = printable(str(error))[:200]
        return where, DataError(f"{where}: not readable: {reason}")


def _jsonl_rows(path: Path) -> Iterator[Row]:
    with open(path, "rb") as file:
        number = 0
        while line := file.readline(MAX_JSON_BYTES + 1):
            number += 1
            where = f"{path.name} line {number}"
            if len(line) > MAX_JSON_BYTES:
                length = len(line) + (0 if line.endswith(b"\n") else _skip_line(file))
                yield where, DataError(f"{where}: {length} bytes, at most {MAX_JSON_BYTES}")
            elif line.strip():
                yield where, _object(line, where)


def _skip_line(file: BinaryIO) -> int:
    length = 0
    while piece := file.readline(MAX_JSON_BYTES):
        length += len(piece)
        if piece.endswith(b"\n"):
            break
    return length


def _json_rows(path: Path) -> Iterator[Row]:
    values = parse_json(read_file(path, MAX_SOURCE_BYTES, "source"), str(path))
    if not isinstance(values, list):
        raise DataError(f"{path}: a {type(values).__name__}; expected a list of samples")
    for number, value in enumerate(values):
        where = f"{path.name} sample {number}"
        good = isinstance(value, dict)
        yield where, value if good else DataError(f"{where}: expected an object of columns")


def _object(line: bytes, where: str) -> dict[str, Any] | DataError:
    try:
        value = parse_json(line, where)
    except DataError as error:
        return error
    return value if isinstance(value, dict) else DataError(f"{where}: expected an object")


def _with_image(row: dict[str, Any], where: str) -> dict[str, Any]:
    """Move `file_name` (or `file_names`) of a row of metadata.jsonl to `images`."""
    names = row.pop("file_names", None) or row.pop("file_name", None)
    if names is None:
        return row
    if row.get("images") or row.get("image"):
        raise DataError(f"{where}: both file_name and an image column; keep one of them")
    if not isinstance(names, str) and not (
        isinstance(names, list) and all(isinstance(name, str) for name in names)
    ):
        raise DataError(f"{where}: file_name is {shown(names)}; expected a name or a list of names")
    return {**row, "images": names}
