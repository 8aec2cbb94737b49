"""Index of a shard: the position of every sample in its tar file.

`shard-000000.index.json` beside `shard-000000.tar` holds the tar's size and, for each sample, its
key and the offset and size of its JSON and of its images. The index is rebuilt from the tar's
headers if it is missing, inconsistent, older than the tar, for a tar of another size, or of an
earlier version.
"""

from __future__ import annotations

import json
import logging
import os
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sr1.data.guards import parse_json, read_file, shown
from megatron_sr1.data.tar_headers import BLOCK, members, parse_header, sample_key
from megatron_sr1.errors import DataError

logger = logging.getLogger(__name__)
IMAGE_EXTENSIONS = frozenset("bmp gif jpeg jpg mpo png ppm tif tiff webp".split())
MAX_INDEX_BYTES = 2**30
VERSION = 2
"""Version of the index; 1 did not order image names that end in a number by that number."""
_NAME_BYTES = 90
"""Longer names, and names that are not ASCII, may be truncated in the header before the data."""


@dataclass(frozen=True)
class Place:
    """Position of a sample in its tar: (offset, size) in bytes of the JSON and of each image."""

    key: str
    text: tuple[int, int]
    images: tuple[tuple[int, int], ...]


def index_path(tar: Path) -> Path:
    """Return the path of a shard's index file."""
    return tar.with_suffix(".index.json")


def scan(tar: Path) -> list[Place]:
    """Read the positions of a shard's samples from its headers, ordered by offset.

    Raises:
        DataError: not a tar, or members that do not form samples; names shard and member.
    """
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    for member in members(tar):
        key, extension = sample_key(member.name)
        if not member.name.isprintable() or key.startswith("/") or ".." in key.split("/"):
            raise DataError(
                f"{tar}: member {shown(member.name)}: expected a printable relative name"
            )
        found = samples.setdefault(key, {})
        if extension in found:
            raise DataError(f"{tar} sample {key}: {key}.{extension} occurs twice")
        found[extension] = (member.offset, member.size)
    places = []
    for key, found in samples.items():
        _check_members(found, key, f"{tar} sample {key}")
        images = sorted(filter(_is_image, found), key=_image_order)
        places.append(Place(key, found["json"], tuple(found[e] for e in images)))
    return sorted(places, key=_begin)


def _check_members(found: Mapping[str, object], key: str, where: str) -> None:
    """Raise DataError unless a sample has exactly one JSON member.

    Several of them belong to different samples whose keys contain a dot.
    """
    texts = sorted(e for e in found if e.split(".")[-1] == "json")
    if texts == ["json"]:
        return
    problem = f"no {key}.json" if "json" not in found else f"{len(texts)} JSON files"
    dots = (
        "; a key ends at the first dot of a name, so all of these are one sample: rename members "
        "so that keys contain no dots, as in v1_0.json and v1_0.0.png"
    )
    held = [f"{key}.{e}" for e in sorted(found)]
    raise DataError(f"{where}: {problem}; it holds {shown(held, 200)}{dots if texts else ''}")


def read_index(tar: Path) -> list[Place]:
    """Read a shard's index, or rebuild it if it does not match the tar."""
    path = index_path(tar)
    try:
        if path.stat().st_mtime_ns >= tar.stat().st_mtime_ns:
            return _usable(parse_json(read_file(path, MAX_INDEX_BYTES, "index"), "index"), tar)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, DataError) as error:
        logger.debug("%s: index not usable: %s", path, error)
    places = scan(tar)
    try:
        write_index(tar, places)
    except OSError as error:
        logger.warning("%s: cannot be written (%s); the index is kept in memory", path, error)
    return places


def check_header(block: bytes, place: Place, span: tuple[int, int], where: str) -> str:
    """Check the header before a span against the index and return the member's extension.

    Raises:
        DataError: the index points to another member.
    """
    header = parse_header(block, where)
    key, extension = sample_key(header.name)
    exact = len(header.name) < _NAME_BYTES and place.key.isascii()
    is_text = span == place.text
    fits = key == place.key and (extension == "json" if is_text else _is_image(extension))
    if header.size != span[1] or (exact and not fits):
        raise DataError(
            f"{where}: its place holds {shown(header.name)} of {header.size} bytes; remove "
            f"{index_path(Path('SHARD.tar')).name} files to rebuild them"
        )
    return extension


def _usable(value: Any, tar: Path) -> list[Place]:
    """Return the positions of an index; raises ValueError or the like if it is not usable."""
    rows, size = value["samples"], tar.stat().st_size
    if value["version"] != VERSION:
        raise ValueError("an earlier version")
    if value["tar_bytes"] != size or value["crc32"] != _checksum(rows):
        raise ValueError("made for another tar, or damaged")
    places = [Place(k, _span(t), tuple(map(_span, i))) for k, t, i in rows]
    spans = sorted(span for p in places for span in (p.text, *p.images))
    ends = [0, *(offset + length for offset, length in spans)]
    inside = all(offset - BLOCK >= end for (offset, _), end in zip(spans, ends, strict=False))
    if not inside or ends[-1] > size:
        raise ValueError("positions outside the tar, or overlapping")
    keys = [place.key for place in places]
    if len(set(keys)) != len(keys) or places != sorted(places, key=_begin):
        raise ValueError("duplicate keys, or out of order")
    return places


def _span(value: Any) -> tuple[int, int]:
    offset, size = value
    if type(offset) is not int or type(size) is not int or size < 0 or offset % BLOCK:
        raise ValueError(f"{value} is not a position")
    return offset, size


def _begin(place: Place) -> int:
    return min(place.text, *place.images)[0] if place.images else place.text[0]


def _is_image(extension: str) -> bool:
    return extension.split(".")[-1] in IMAGE_EXTENSIONS


def _image_order(extension: str) -> tuple[list[str | tuple[int, str]], str]:
    """Return a sort key that compares numbers in a name by value: image_2 before image_10."""
    parts: list[str | tuple[int, str]] = [*re.split("([0-9]+)", extension)]
    for place in range(1, len(parts), 2):
        digits = str(parts[place]).lstrip("0")
        parts[place] = len(digits), digits
    return parts, extension


def _checksum(rows: Any) -> int:
    return zlib.crc32(json.dumps(rows).encode())


def write_index(tar: Path, places: list[Place]) -> None:
    """Write a shard's index beside it."""
    rows = [(p.key, p.text, p.images) for p in places]
    write_json(
        index_path(tar),
        {
            "version": VERSION,
            "tar_bytes": tar.stat().st_size,
            "crc32": _checksum(rows),
            "samples": rows,
        },
    )


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file atomically, so that another process never reads a partial file."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(json.dumps(value) + "\n")
    os.replace(part, path)
