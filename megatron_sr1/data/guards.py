"""Safe reading of untrusted files, JSON and text, each within limits.

Nothing here blocks (on a pipe), executes its input, or reads without a limit. What is not valid
raises a `DataError` of one line; `located` adds the file and sample at the boundaries.
"""

from __future__ import annotations

import json
import os
import stat
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_sr1.errors import DataError

MAX_JSON_BYTES = 16 * 2**20
"""Per sample: a line of jsonl, a member of a shard."""
MAX_TEXT_CHARACTERS = 2**20
"""Per sample, all turns together: four times as much as a context of 100,000 tokens holds."""
MAX_IMAGE_BYTES = 256 * 2**20
MAX_IMAGES = 1024
"""Per sample."""


@contextmanager
def located(where: str) -> Iterator[None]:
    """Put the place in front of the message of a `DataError` that the block raises."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{where}: {error}") from None


def read_file(path: Path, max_bytes: int) -> bytes:
    """Read a regular file, also through links; a pipe or a device is an error and never blocks."""
    try:
        with open(path, "rb", opener=lambda p, flags: os.open(p, flags | os.O_NONBLOCK)) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise DataError("not a regular file")
            if status.st_size > max_bytes:
                raise DataError(f"{status.st_size} bytes, at most {max_bytes}")
            return file.read(max_bytes)
    except (OSError, ValueError) as error:  # ValueError: a NUL or half a character in the name
        raise DataError(error.strerror if isinstance(error, OSError) else str(error)) from None


def inside(folder: Path, name: str) -> Path:
    """Return the path of a file that a sample names; it is no URL and does not leave `folder`."""
    if "://" in name or name.startswith(("file:", "~")):
        raise DataError(f"{shown(name)} is a URL; expected a path in {folder}")
    # The files of a snapshot in the hub's cache are links to blobs/ beside it.
    snapshots = (each for each in (folder, *folder.parents) if each.parent.name == "snapshots")
    blobs = next((each.parent.parent / "blobs" for each in snapshots), folder)
    try:
        place = (folder / name).resolve()
        is_inside = any(place.is_relative_to(each.resolve()) for each in (folder, blobs))
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: a cycle of links
        raise DataError(f"{shown(name)} is no path: {printable(error)}") from None
    if not is_inside:
        raise DataError(f"{shown(name)} leads out of {folder}")
    return folder / name


def parse_json(data: bytes) -> Any:
    """Parse UTF-8 JSON with unique keys per object; a byte order mark is allowed."""
    try:
        return json.loads(data.decode("utf-8-sig"), object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8: {error.reason} at byte {error.start}") from None
    except RecursionError:
        raise DataError("not JSON that can be read: nested too deeply") from None
    except ValueError as error:
        raise DataError(f"not JSON: {printable(error)}") from None


def read_json(path: Path, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """Read a JSON file as `read_file` and `parse_json` do."""
    with located(str(path)):
        return parse_json(read_file(path, max_bytes))


def check_text(text: str) -> str:
    """Return the text if it can be encoded as UTF-8 and is not too long."""
    if len(text) > MAX_TEXT_CHARACTERS:
        raise DataError(f"{len(text)} characters, at most {MAX_TEXT_CHARACTERS}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"character {error.start} is half of a surrogate pair"
        raise DataError(f"{half}; expected text") from None
    return text


def is_json(name: Any, value: Any) -> bool:
    """Return True if an entry can be written as UTF-8 JSON, without infinities and NaN."""
    try:
        json.dumps({name: value}, allow_nan=False, ensure_ascii=False).encode()
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def shown(value: Any, limit: int = 80) -> str:
    """Format a value for an error message: one line of at most `limit` characters."""
    if isinstance(value, str | bytes):
        text = repr(value[:limit])
    elif isinstance(value, list | tuple):
        text = repr(list(value[:5]))[:limit]
    else:
        text = type(value).__name__ if isinstance(value, dict) else repr(value)[:limit]
    return printable(text, 400)


def printable(value: object, limit: int = 200) -> str:
    """Format a text or an error for a message: one line, without the middle of a long text."""
    text = str(value)
    if len(text) > limit:
        text = f"{text[: limit // 2]}…{text[-limit // 2 :]}"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        key = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"key {key[:40]!r} twice in one object")
    return value
