"""The last step in wandb's files of an offline run, which may have been killed.

In: a run directory and a run's id. Out: the highest step on the disk. wandb buffers records and
writes them in blocks, so that a logged step may be missing after a kill.

The format is LevelDB's log (github.com/google/leveldb, doc/log_format.md) after a header of 7
bytes: blocks of 32 KiB with fragments of records, each with a checksum, length and kind. A record
is one of wandb's protobuf messages.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from pathlib import Path

HEADER_BYTES, BLOCK_BYTES = 7, 32768
FRAGMENT = struct.Struct("<IHB")
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def last_step(run_dir: Path, run_id: str, step_of: Callable[[bytes], int | None]) -> int:
    """Return the highest step in the files of a run; 0 if there is none.

    Args:
        run_dir: run directory, which contains wandb's.
        run_id: wandb's id of the run.
        step_of: returns a record's step, or None for other kinds of records.
    """
    found = [0]
    for path in sorted((run_dir / "wandb").glob(f"*run-*/run-{run_id}.wandb")):
        found += [step for step in map(step_of, records(path)) if step is not None]
    return max(found)


def records(path: Path) -> Iterator[bytes]:
    """Yield the complete records of a file, up to where it was truncated."""
    data = path.read_bytes()
    position, parts = HEADER_BYTES, b""
    while position + FRAGMENT.size <= len(data):
        left = BLOCK_BYTES - position % BLOCK_BYTES
        if left < FRAGMENT.size:  # a fragment never begins in the last bytes of a block
            position += left
            continue
        _, length, kind = FRAGMENT.unpack_from(data, position)
        position += FRAGMENT.size + length
        if kind not in (FULL, FIRST, MIDDLE, LAST) or position > len(data):
            return
        fragment = data[position - length : position]
        parts = fragment if kind in (FULL, FIRST) else parts + fragment
        if kind in (FULL, LAST):
            yield parts
