"""Whether a checkpoint fits on the disk: looked at before a save, and told when it did not.

In: Megatron's description of what a rank saves, and a folder. Out: bytes needed by all ranks, or
an error that says how much is needed and how much is free.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_sr1.checkpoint.files import size_text
from megatron_sr1.errors import CheckpointError

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
