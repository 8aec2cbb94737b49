"""Files of a checkpoint on the disk: their manifest, the page cache, free space; free of torch.

`manifest.json` holds

    {"format": 1, "digest": "sha256", "files": {NAME: {"bytes": n, "digest": hex}, …}}

for all files but itself. saving.py writes it: each rank measures the files that it wrote, which are
still in the page cache. loading.py compares it. A file that the disk changes between the write and
the read for its digest goes unnoticed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from megatron_sr1.errors import CheckpointError
from megatron_sr1.runtime.files import write_text

MANIFEST = "manifest.json"
FORMAT = 1
# The fastest of hashlib on CPUs with instructions for it; 0.5 GiB/s on one without.
DIGEST = "sha256"
MAX_BYTES = 64 * 2**20
NUM_LISTED = 6
# Of each stored tensor's own header, and of the files that hold no tensors.
TENSOR_OVERHEAD_BYTES = 1600
OTHER_BYTES = 2**20
PROBE_BYTES = 2**20


@dataclass(frozen=True)
class Measure:
    """Size and hexadecimal digest of a file's contents."""

    num_bytes: int
    digest: str


def measure(path: Path, sync: bool = False) -> Measure:
    """Measure a file; with `sync`, also flush it to the disk."""
    with path.open("rb") as file:
        if sync:
            os.fsync(file.fileno())
        digest = hashlib.file_digest(file, DIGEST).hexdigest()
        return Measure(file.tell(), digest)


def write_record(folder: Path, measures: Mapping[str, Measure]) -> None:
    """Write the manifest of a directory, to the disk; on one rank."""
    files = {n: {"bytes": m.num_bytes, "digest": m.digest} for n, m in sorted(measures.items())}
    record = {"format": FORMAT, "digest": DIGEST, "files": files}
    write_text(folder / MANIFEST, json.dumps(record, indent=1) + "\n", sync=True)


def read_manifest(folder: Path) -> dict[str, Measure]:
    """Read a manifest; refuse one that has another form or names files outside its directory."""
    path = folder / MANIFEST
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise CheckpointError(f"{path}: {size_text(size)}, too large for a manifest")
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if record["format"] != FORMAT or record["digest"] != DIGEST:
            raise CheckpointError(
                f"{path}: format {record['format']!r} with {record['digest']!r}; expected "
                f"{FORMAT} with {DIGEST}"
            )
        found = {n: Measure(int(e["bytes"]), str(e["digest"])) for n, e in record["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged: {type(error).__name__} {error}") from None
    for name in found:
        inside = PurePosixPath(name)
        if inside.is_absolute() or ".." in inside.parts or str(inside) != name:
            raise CheckpointError(f"{path}: {name!r} is no name of a file in its directory")
    return found


def is_whole(folder: Path) -> bool:
    """Return True if a checkpoint's files are there with their sizes."""
    if not (folder / MANIFEST).exists():  # older releases wrote none
        return (folder / ".metadata").is_file()
    try:
        return not problems_of(folder, digests=False)
    except (OSError, CheckpointError):
        return False


def problems_of(folder: Path, digests: bool, rank: int = 0, size: int = 1) -> list[str]:
    """Describe how files differ from the manifest; each of `size` ranks looks at a part of them.

    Tensor files that the manifest does not list are named by rank 0; a user's notes are allowed.
    """
    files = read_manifest(folder)
    by_size = sorted(files, key=lambda name: (-files[name].num_bytes, name))
    problems = [_problem_of(folder, name, files[name], digests) for name in by_size[rank::size]]
    extra = {path.name for path in folder.glob("*.distcp")} - files.keys() if rank == 0 else ()
    return [p for p in problems if p] + [f"{name}: not of this checkpoint" for name in extra]


def _problem_of(folder: Path, name: str, expected: Measure, digests: bool) -> str:
    path = folder / name
    try:
        if not path.is_file():
            return f"{name}: missing, {expected.num_bytes} bytes expected"
        size = path.stat().st_size
        if size != expected.num_bytes:
            way = "shorter" if size < expected.num_bytes else "longer"
            return f"{name}: {way}, {size} bytes came, {expected.num_bytes} expected"
        came = measure(path).digest if digests else expected.digest
    except OSError as error:
        return f"{name}: {error.strerror}"
    if came == expected.digest:
        return ""
    return f"{name}: other contents, {DIGEST} {came[:12]}…, expected {expected.digest[:12]}…"


def listed(problems: Sequence[str]) -> str:
    """Join the first problems for a message, with the number of those left out."""
    more = [f"{len(problems) - NUM_LISTED} more"] if len(problems) > NUM_LISTED else []
    return "; ".join([*problems[:NUM_LISTED], *more])


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

    Torch's writer in C++ does not report why a write failed; writing a little more shows it.
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
