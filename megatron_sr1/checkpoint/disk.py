"""File operations of checkpoints: digests, the page cache, free space.

In: paths, and Megatron's description of what a rank saves. Out: the size and digest of a file, and
an error that states how much space a save needs and how much is free.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sr1.errors import CheckpointError

# The fastest of hashlib on CPUs with instructions for it; 0.5 GiB/s on one without.
DIGEST = "sha256"


@dataclass(frozen=True)
class Measure:
    """What a file held when it was looked at.

    Attributes:
        num_bytes: its size.
        digest: of its contents, hexadecimal.
    """

    num_bytes: int
    digest: str


def measure(path: Path, sync: bool = False) -> Measure:
    """Size and digest of a file.

    Args:
        path: of a regular file.
        sync: also bring its contents to the disk.

    Raises:
        OSError: it cannot be read, or the disk is full.
    """
    with path.open("rb") as file:
        if sync:
            os.fsync(file.fileno())
        digest = hashlib.file_digest(file, DIGEST).hexdigest()
        return Measure(file.tell(), digest)


def expect_pages(file: int, offset: int, num_bytes: int) -> None:
    """Have a part of an open file be fetched from the disk at once, and not page by page."""
    os.posix_fadvise(file, offset, num_bytes, os.POSIX_FADV_WILLNEED)


def forget_pages(path: Path) -> None:
    """Bring a file to the disk and leave the memory that holds it to others."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def size_text(num_bytes: int) -> str:
    """A size for people, as `3.1 GiB`."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.1f} {unit}"
    return f"{num_bytes} bytes"


# Of each stored tensor's own header, and of the files that hold none.
TENSOR_OVERHEAD_BYTES = 1600
OTHER_BYTES = 2**20
PROBE_BYTES = 2**20


def needed_bytes(state: Mapping[str, Any]) -> int:
    """About how much this rank writes of a sharded state dict."""
    from megatron.core.dist_checkpointing.mapping import ShardedBase, is_main_replica

    total = 0
    stack: list[Any] = [state]
    while stack:
        item = stack.pop()
        if isinstance(item, Mapping):
            stack.extend(item.values())
        elif isinstance(item, (list, tuple)):
            stack.extend(item)
        elif isinstance(item, ShardedBase) and is_main_replica(item.replica_id):
            total += getattr(item.data, "nbytes", 0) + TENSOR_OVERHEAD_BYTES
    return total


def free_bytes(folder: Path) -> int:
    """Space left for files in a folder."""
    return shutil.disk_usage(folder).free


def check_room(folder: Path, needed: int) -> None:
    """Refuse to begin what cannot be finished.

    Raises:
        CheckpointError: less is free than needed.
    """
    free = free_bytes(folder)
    if free < needed + OTHER_BYTES:
        raise CheckpointError(f"No space left on device for {room_text(folder, needed)}")


def why_not_written(folder: Path) -> str:
    """What the disk says when asked for a little more; "" if it gives it.

    Torch's writer in C++ says that a write failed, but not why.
    """
    probe = folder / ".probe"
    try:
        probe.write_bytes(bytes(PROBE_BYTES))
    except OSError as error:
        return f"{error.strerror}: "
    finally:
        probe.unlink(missing_ok=True)
    return ""


def room_text(folder: Path, needed: int) -> str:
    """Needed and free, for messages."""
    return (
        f"about {size_text(needed + OTHER_BYTES)}, {size_text(free_bytes(folder))} free in "
        f"{folder.parent}"
    )
