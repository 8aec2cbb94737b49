"""The page cache, and the free space that a save needs; free of torch."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_sr1.errors import CheckpointError

# Of each stored tensor's own header, and of the files that hold no tensors.
TENSOR_OVERHEAD_BYTES = 1600
OTHER_BYTES = 2**20
PROBE_BYTES = 2**20


def read_ahead(file: int, offset: int, num_bytes: int) -> None:
    """Have the kernel fetch a range of an open file at once instead of page by page."""
    os.posix_fadvise(file, offset, num_bytes, os.POSIX_FADV_WILLNEED)


def flush_and_evict(path: Path) -> None:
    """Flush a file to the disk and drop it from the page cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def size_text(num_bytes: int) -> str:
    """Format a size, as `3.1 GiB`."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.1f} {unit}"
    return f"{num_bytes} bytes"


def needed_bytes(state: Mapping[str, Any]) -> int:
    """Estimate how many bytes this rank writes of a sharded state dict."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedBase, is_main_replica

    return sum(
        getattr(item.data, "nbytes", 0) + TENSOR_OVERHEAD_BYTES
        for item in nested_values(state)
        if isinstance(item, ShardedBase) and is_main_replica(item.replica_id)
    )


def free_bytes(folder: Path) -> int:
    """Return the space left for files in a directory."""
    return shutil.disk_usage(folder).free


def check_space(folder: Path, needed: int) -> None:
    """Raise `CheckpointError` if less is free than `needed` bytes of tensors take."""
    if free_bytes(folder) < needed + OTHER_BYTES:
        raise CheckpointError(f"No space left on device for {_space_text(folder, needed)}")


def write_failure(folder: Path, needed: int, problem: str) -> str:
    """Describe a failed write: the disk's own error, the problem, and the space needed and free.

    Torch's writer in C++ reports that a write failed but not why. Writing a little more gives the
    reason.
    """
    cause, probe = "", folder / ".probe"
    try:
        probe.write_bytes(bytes(PROBE_BYTES))
    except OSError as error:
        cause = f"{error.strerror}: "
    finally:
        probe.unlink(missing_ok=True)
    return f"{cause}{problem} ({_space_text(folder, needed)})"


def _space_text(folder: Path, needed: int) -> str:
    free, needed = free_bytes(folder), needed + OTHER_BYTES
    return f"about {size_text(needed)}, {size_text(free)} free in {folder.parent}"
