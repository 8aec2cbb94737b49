"""The checksums of a checkpoint: written with it, compared before anything of it is read.

In: a folder that all ranks have written to. Out: its `manifest.json`,

    {"format": 1, "digest": "sha256", "files": {NAME: {"bytes": n, "digest": hex}, …}}

over all files but itself. When saving, each rank takes the files that it wrote, which are still in
its machine's memory; when reading, files are dealt out by size. Not covered: a file that the disk
itself changes between the writing and the reading for its digest.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from megatron_sr1.checkpoint.files import DIGEST, Measure, measure, size_text, write_text
from megatron_sr1.checkpoint.together import on_writer, together
from megatron_sr1.errors import CheckpointError
from megatron_sr1.runtime.groups import Groups

MANIFEST = "manifest.json"
FORMAT = 1
MAX_BYTES = 64 * 2**20
NUM_NAMED = 6  # files that an error names


def write_manifest(
    folder: Path, groups: Groups, known: Mapping[str, Measure] | None = None
) -> None:
    """Measure all files of a folder and bring them to the disk; collective over all ranks.

    Args:
        folder: that all ranks have written to.
        groups: the layout.
        known: files of this rank that are on the disk and measured already.

    Raises:
        CheckpointError: on all ranks, if a file cannot be read or the disk is full.
    """
    rank = groups.world.rank

    def own() -> dict[str, Measure]:
        # Megatron-Core names a rank's files so; what is named otherwise is left to rank 0.
        mine = (f"__{rank}_*", f"rng_{rank}.pt")
        names = sorted(p.name for pattern in mine for p in folder.glob(pattern))
        new = {name: measure(folder / name, sync=True) for name in names if name not in found}
        return {**found, **new}

    found: dict[str, Measure] = dict(known or {})
    for part in together(groups, own):
        found.update(part)

    def write() -> None:
        for name in _names(folder):
            if name not in found:
                found[name] = measure(folder / name, sync=True)
        files = {n: {"bytes": m.num_bytes, "digest": m.digest} for n, m in sorted(found.items())}
        record = {"format": FORMAT, "digest": DIGEST, "files": files}
        write_text(folder / MANIFEST, json.dumps(record, indent=1) + "\n")

    on_writer(groups, write)


def check_files(folder: Path, groups: Groups, *, digests: bool, advice: str) -> None:
    """Compare a folder with its manifest; collective over all ranks.

    Args:
        folder: with a manifest.
        groups: the layout; its ranks share the reading.
        digests: False compares names and sizes only.
        advice: what to do, for the message.

    Raises:
        CheckpointError: on all ranks the same, naming files, what was expected and what came.
    """
    rank, size = groups.world.rank, groups.world.size

    def look() -> list[str]:
        files = read_manifest(folder)
        by_size = sorted(files, key=lambda name: (-files[name].num_bytes, name))
        problems = [_problem(folder, n, files[n], digests) for n in by_size[rank::size]]
        if rank == 0:
            problems += _extra(folder, files)
        return [problem for problem in problems if problem]

    problems = sorted(problem for part in together(groups, look) for problem in part)
    if problems:
        more = f"; {len(problems) - NUM_NAMED} more" if len(problems) > NUM_NAMED else ""
        raise CheckpointError(
            f"{folder}: not as it was saved ({MANIFEST}): {'; '.join(problems[:NUM_NAMED])}{more}; "
            f"{advice}"
        )


def is_whole(folder: Path) -> bool:
    """Whether a folder's files are there with their sizes; without a manifest, if some are."""
    if not (folder / MANIFEST).exists():
        return (folder / ".metadata").is_file()
    try:
        files = read_manifest(folder)
    except (OSError, CheckpointError):
        return False
    return not _extra(folder, files) and not any(
        _problem(folder, name, expected, digests=False) for name, expected in files.items()
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


def _names(folder: Path) -> list[str]:
    """All files of a folder but its manifest."""
    names = (p.relative_to(folder).as_posix() for p in sorted(folder.rglob("*")) if p.is_file())
    return [name for name in names if name != MANIFEST]


def _problem(folder: Path, name: str, expected: Measure, digests: bool) -> str:
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


def _extra(folder: Path, files: dict[str, Measure]) -> list[str]:
    """Tensor files that do not belong there; notes of a user may."""
    extra = sorted(p.name for p in folder.glob("*.distcp") if p.name not in files)
    return [f"{name}: not of this checkpoint" for name in extra]
