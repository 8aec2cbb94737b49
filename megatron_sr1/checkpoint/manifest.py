"""The manifest of a checkpoint: size and digest of each file.

In: a checkpoint's directory. Out: what `manifest.json` records,

    {"format": 1, "digest": "sha256", "files": {NAME: {"bytes": n, "digest": hex}, …}}

over all files but itself, and how a file differs from it. saving.py writes it: each rank measures
the files that it wrote, which are still in its machine's memory. loading.py compares it: ranks
share the files by size. Not covered: a file that the disk changes between the writing and the
reading for its digest. Free of torch.
"""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from typing import Any

from megatron_sr1.checkpoint.disk import DIGEST, Measure, measure, size_text
from megatron_sr1.errors import CheckpointError

MANIFEST = "manifest.json"
FORMAT = 1
MAX_BYTES = 64 * 2**20


def is_whole(folder: Path) -> bool:
    """Whether a folder's files are there with their sizes; without a manifest, if some are."""
    if not (folder / MANIFEST).exists():
        return (folder / ".metadata").is_file()
    try:
        files = read_manifest(folder)
    except (OSError, CheckpointError):
        return False
    return not extra_files(folder, files) and not any(
        problem_of(folder, name, expected, digests=False) for name, expected in files.items()
    )


def read_manifest(folder: Path) -> dict[str, Measure]:
    """What a manifest says of each file.

    Raises:
        CheckpointError: no manifest, not of this form, or with names outside the folder.
    """
    path = folder / MANIFEST
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise CheckpointError(f"{path}: {size_text(size)}, which no manifest of ours has")
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
        parts = PurePosixPath(name).parts
        if name.startswith("/") or ".." in parts or "/".join(parts) != name:
            raise CheckpointError(f"{path}: {name!r} is no name of a file in its folder")
    return found


def problem_of(folder: Path, name: str, expected: Measure, digests: bool) -> str:
    """What is wrong with a file, or ""."""
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
    if came != expected.digest:
        return (
            f"{name}: other contents, {DIGEST} {came[:12]}… came, {expected.digest[:12]}… expected"
        )
    return ""


def extra_files(folder: Path, files: dict[str, Measure]) -> list[str]:
    """Tensor files that do not belong there; notes of a user may."""
    extra = sorted(p.name for p in folder.glob("*.distcp") if p.name not in files)
    return [f"{name}: not of this checkpoint" for name in extra]
