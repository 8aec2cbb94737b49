"""Where every sample lies in its shard: written when shards are made, made again when stale.

`shard-000000.index.json` beside `shard-000000.tar` holds the tar's size and, for each sample, its
key and the offset and size of its JSON and of its images. It is as good as the tar's headers,
which it is read from when it is missing, older than the tar or about a tar of another size.
"""

from __future__ import annotations

import json
import logging
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sr1.errors import DataError

logger = logging.getLogger(__name__)
IMAGE_EXTENSIONS = frozenset("bmp gif jpeg jpg mpo png ppm tif tiff webp".split())


@dataclass(frozen=True)
class Place:
    """Where a sample lies in its tar: (offset, size) in bytes of the JSON and of each image."""

    key: str
    text: tuple[int, int]
    images: tuple[tuple[int, int], ...]


def index_path(tar: Path) -> Path:
    """The index file beside a shard."""
    return tar.with_suffix(".index.json")


def _members(tar: Path) -> Iterator[tuple[str, str, tuple[int, int]]]:
    """(key, extension, place) of each regular member."""
    try:
        with tarfile.open(tar, "r:") as file:
            for member in file:
                if member.isfile():
                    folder, _, name = member.name.rpartition("/")
                    key, _, extension = name.partition(".")
                    key = f"{folder}/{key}" if folder else key
                    yield key, extension.lower(), (member.offset_data, member.size)
    except (tarfile.TarError, OSError) as error:
        raise DataError(f"{tar}: not a readable tar: {error}") from None


def scan(tar: Path) -> list[Place]:
    """Read a shard's headers for the places of its samples.

    Raises:
        DataError: not a tar, or a sample without its JSON.
    """
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    for key, extension, span in _members(tar):
        samples.setdefault(key, {})[extension] = span
    places = []
    for key, members in samples.items():
        if "json" not in members:
            raise DataError(f"{tar} sample {key}: no {key}.json; it holds {sorted(members)}")
        images = sorted(
            (e for e in members if e.split(".")[-1] in IMAGE_EXTENSIONS),
            key=lambda e: (int(e.split(".")[0]) if e.split(".")[0].isdigit() else 0, e),
        )
        places.append(Place(key, members["json"], tuple(members[e] for e in images)))
    return places


def read_index(tar: Path) -> list[Place]:
    """A shard's index; made again where it is missing, older than the tar, or of another size."""
    path = index_path(tar)
    try:
        if path.stat().st_mtime_ns >= tar.stat().st_mtime_ns:
            value = json.loads(path.read_text())
            if value["tar_bytes"] == tar.stat().st_size:
                return [Place(k, tuple(t), tuple(map(tuple, i))) for k, t, i in value["samples"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.debug("%s: index not usable: %s", path, error)
    places = scan(tar)
    try:
        write_index(tar, places)
    except OSError as error:
        logger.warning("%s: cannot be written (%s); the index is kept in memory", path, error)
    return places


def write_index(tar: Path, places: list[Place]) -> None:
    """Write a shard's index beside it."""
    rows = [(p.key, p.text, p.images) for p in places]
    write_json(index_path(tar), {"tar_bytes": tar.stat().st_size, "samples": rows})


def write_json(path: Path, value: Any) -> None:
    """Write in one step, so that another process never sees half a file."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(json.dumps(value) + "\n")
    os.replace(part, path)
