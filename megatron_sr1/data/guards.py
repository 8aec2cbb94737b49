"""Safe reading of untrusted files, JSON and text, each within limits.

Nothing here blocks (on a pipe), executes its input, or reads without a limit. Every failure is a
`DataError` whose message is one line.
"""

from __future__ import annotations

import json
import os
import stat
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


def read_file(path: Path, max_bytes: int, where: str) -> bytes:
    """Read a regular file; a pipe, a device or a directory is rejected without blocking on it.

    Args:
        path: symbolic links are followed.
        max_bytes: larger files are rejected before they are read.
        where: prefix of errors, which names the sample or the file.

    Raises:
        DataError: the file is missing, not a regular file, or too large.
    """
    name = f"{where}: {printable(str(path))}"
    file = None
    try:
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode):
            raise DataError(f"{name}: not a regular file")
        if status.st_size > max_bytes:
            raise DataError(f"{name}: {status.st_size} bytes, at most {max_bytes}")
        with open(file, "rb", closefd=False) as opened:
            return opened.read(max_bytes)
    except (OSError, ValueError) as error:  # ValueError: a NUL or half a character in the name
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise DataError(f"{name}: {reason}", kind=f"file: {reason}") from None
    finally:
        if file is not None:
            os.close(file)


def inside(folder: Path, name: str | Path, where: str) -> Path:
    """Return the path of a file that a sample names, which must resolve to a place in `folder`.

    Raises:
        DataError: the name is a URL, leads out of the folder, or is not a valid path.
    """
    if "://" in str(name) or str(name).startswith(("file:", "data:", "~")):
        raise DataError(
            f"{where}: {shown(str(name))} is a URL; expected a path in {folder}",
            kind="a URL in place of a file",
        )
    try:
        found = (folder / name).resolve()
        if found.is_relative_to(folder.resolve()):
            return folder / name
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: a cycle of links
        reason = printable(str(error), 200)
        raise DataError(f"{where}: {shown(str(name))} is no path: {reason}") from None
    raise DataError(
        f"{where}: {shown(str(name))} leads out of {folder}", kind="a path out of the folder"
    )


def parse_json(data: bytes, where: str) -> Any:
    """Parse UTF-8 JSON with unique keys per object; a byte order mark is allowed.

    Raises:
        DataError: invalid input, a repeated key, or too deep nesting.
    """
    try:
        return json.loads(data.decode("utf-8-sig"), object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8: {error.reason} at byte {error.start}") from None
    except RecursionError:
        raise DataError(f"{where}: not JSON that can be read: nested too deeply") from None
    except ValueError as error:
        raise DataError(f"{where}: not JSON: {printable(str(error))[:200]}") from None


def check_text(text: str, where: str) -> str:
    """Return the text if it can be encoded as UTF-8 and tokenised.

    Raises:
        DataError: the text contains half of a surrogate pair, or is too long.
    """
    if len(text) > MAX_TEXT_CHARACTERS:
        raise DataError(f"{where}: {len(text)} characters, at most {MAX_TEXT_CHARACTERS}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: character {error.start} is half of a surrogate pair; expected text"
        ) from None
    return text


def is_json(value: Any) -> bool:
    """Return True if a value can be written as UTF-8 JSON, without infinities and NaN."""
    try:
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
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
    return printable(text)


def printable(text: str, limit: int = 400) -> str:
    """Escape control characters and line breaks, and omit the middle of a long text."""
    if len(text) > limit:
        text = f"{text[: limit // 2]}…{text[-limit // 2 :]}"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in value if keys.count(key) > 1)
        raise ValueError(f"key {twice[:40]!r} twice in one object")
    return value
