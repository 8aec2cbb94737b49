"""Atomic replacement of files: readers see the old contents or the new, never a part.

The contents are first written to `.NAME.PID.partial` in the same directory, so that processes
writing the same file do not disturb each other. Only a process that is killed leaves such a file.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path, sync: bool = False) -> Iterator[Path]:
    """Yield a path to write to; rename it to `path` afterwards, or remove it if the block raises.

    The directory of `path` must exist. With `sync`, the contents and the name are flushed to the
    disk, so that the file survives a loss of power.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        if sync:
            with partial.open("rb") as file:
                os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    if sync:
        sync_directory(path.parent)


def write_text(path: Path, text: str, sync: bool = False) -> None:
    """Replace a file with UTF-8 text; arguments as in `replacing`."""
    with replacing(path, sync) as partial:
        partial.write_text(text, encoding="utf-8")


def sync_directory(directory: Path) -> None:
    """Flush the names in a directory to the disk."""
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
