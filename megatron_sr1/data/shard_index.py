"""Index of a shard: the position of every sample in its tar file.

`shard-000000.index.json` beside `shard-000000.tar` holds the tar's size and, for each sample, its
key and the offset and size of its JSON and of its images. It is rebuilt from the tar's headers if
it is missing, inconsistent, older than the tar, for a tar of another size, or of an earlier
version. Python's tarfile reads single headers, but not the tar: it follows links, sparse maps and
pax records of any length, some in quadratic time, and stops silently at a broken header. Here
members that cannot hold a sample are rejected by name, and the last one must be followed by the
end mark. Source: POSIX.1-2001, pax interchange format.
"""

from __future__ import annotations

import json
import logging
import os
import re
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from megatron_sr1.data.guards import located, printable, read_json, shown
from megatron_sr1.errors import DataError
from megatron_sr1.runtime.files import write_text

logger = logging.getLogger(__name__)
IMAGE_EXTENSIONS = frozenset("bmp gif jpeg jpg mpo png ppm tif tiff webp".split())
MAX_INDEX_BYTES = 2**30
VERSION = 2
"""Version of the index; 1 did not order image names that end in a number by that number."""
BLOCK = 512
MAX_EXTRA_BYTES = 64 * 1024
"""Limit of a pax record or a GNU long name."""
_NAME_BYTES = 90
"""Longer names, and names that are not ASCII, may be truncated in the header before the data."""
_REGULAR = (b"0", b"\0", b"7")
_LONG_NAME, _PAX, _PAX_GLOBAL, _FOLDER = b"L", b"x", b"g", b"5"
_REJECTED = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a character device",
    b"4": "a block device",
    b"6": "a FIFO",
    b"S": "a sparse file",
}
Span = tuple[int, int]
"""Offset and size of a member's data, bytes."""


class Place(NamedTuple):
    """Position of a sample in its tar: the spans of its JSON and of each image."""

    key: str
    text: Span
    images: tuple[Span, ...]


def index_path(tar: Path) -> Path:
    """Return the path of a shard's index file."""
    return tar.with_suffix(".index.json")


def read_index(tar: Path) -> list[Place]:
    """Read a shard's index, or rebuild it if it does not match the tar."""
    path = index_path(tar)
    try:
        if path.stat().st_mtime_ns >= tar.stat().st_mtime_ns:
            return _usable(read_json(path, MAX_INDEX_BYTES), tar)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, DataError) as error:
        logger.debug("%s: index not usable: %s", path, error)
    places = scan(tar)
    try:
        write_index(tar, places)
    except OSError as error:
        logger.warning("%s: cannot be written (%s); the index is kept in memory", path, error)
    return places


def write_index(tar: Path, places: list[Place]) -> None:
    """Write a shard's index beside it."""
    index = {"version": VERSION, "tar_bytes": tar.stat().st_size, "crc32": _checksum(places)}
    write_text(index_path(tar), json.dumps({**index, "samples": places}) + "\n")


def scan(tar: Path) -> list[Place]:
    """Read the positions of a shard's samples from its headers, ordered by offset.

    Raises:
        DataError: not a tar, truncated, damaged, or members that do not form samples.
    """
    samples: dict[str, dict[str, Span]] = {}
    try:
        if not tar.is_file():  # opening a pipe would block
            raise DataError(f"{tar}: not a regular file; expected a tar")
        with open(tar, "rb") as file:
            for name, span in _members(file, tar):
                key, extension = _sample_key(name)
                if not name.isprintable() or key.startswith("/") or ".." in key.split("/"):
                    what = "expected a printable relative name"
                    raise DataError(f"{tar}: member {shown(name)}: {what}")
                if extension in samples.setdefault(key, {}):
                    raise DataError(f"{tar} sample {key}: {key}.{extension} occurs twice")
                samples[key][extension] = span
    except OSError as error:
        raise DataError(f"{tar}: not a readable tar: {error.strerror}") from None
    return sorted((_place(key, found, tar) for key, found in samples.items()), key=_begin)


def check_header(block: bytes, place: Place, span: Span) -> None:
    """Check the header before a span of a sample; the index may point to another member."""
    name, _, size = _parse_header(block)
    key, extension = _sample_key(name)
    exact = len(name) < _NAME_BYTES and place.key.isascii()
    is_text = span == place.text
    fits = key == place.key and (extension == "json" if is_text else _is_image(extension))
    if size != span[1] or (exact and not fits):
        held = f"its place holds {shown(name)} of {size} bytes"
        raise DataError(f"{held}; remove SHARD.index.json files to rebuild them")


def _usable(value: Any, tar: Path) -> list[Place]:
    """Return the positions of an index; raises ValueError or the like if it is not usable."""
    rows, size = value["samples"], tar.stat().st_size
    if (value["version"], value["tar_bytes"], value["crc32"]) != (VERSION, size, _checksum(rows)):
        raise ValueError("of an earlier version, for another tar, or damaged")
    places = [Place(k, _span(t), tuple(map(_span, i))) for k, t, i in rows]
    spans = sorted(span for p in places for span in (p.text, *p.images))
    ends = [0, *(offset + length for offset, length in spans)]
    inside = all(offset - BLOCK >= end for (offset, _), end in zip(spans, ends, strict=False))
    unique = len({place.key for place in places}) == len(places)
    if not (inside and unique) or ends[-1] > size or places != sorted(places, key=_begin):
        raise ValueError("positions outside the tar or overlapping, duplicate keys, or unordered")
    return places


def _span(value: Any) -> Span:
    offset, size = value
    if type(offset) is not int or type(size) is not int or size < 0 or offset % BLOCK:
        raise ValueError(f"{value} is not a position")
    return offset, size


def _begin(place: Place) -> Span:
    return min((place.text, *place.images))


def _checksum(rows: Any) -> int:
    return zlib.crc32(json.dumps(rows).encode())


def _sample_key(name: str) -> tuple[str, str]:
    """Split a member's name at its first dot into (key, extension)."""
    folder, _, last = name.rpartition("/")
    key, _, extension = last.partition(".")
    return (f"{folder}/{key}" if folder else key), extension.lower()


def _place(key: str, found: Mapping[str, Span], tar: Path) -> Place:
    """Return the position of a sample, which has one JSON member; several have keys with a dot."""
    texts = [e for e in found if e.split(".")[-1] == "json"]
    if texts == ["json"]:
        images = sorted(filter(_is_image, found), key=_image_order)
        return Place(key, found["json"], tuple(found[e] for e in images))
    problem = f"no {key}.json" if "json" not in found else f"{len(texts)} JSON files"
    dots = (
        "; a key ends at the first dot of a name, so all of these are one sample: rename members "
        "so that keys contain no dots, as in v1_0.json and v1_0.0.png"
    )
    held = shown([f"{key}.{e}" for e in sorted(found)], 200)
    raise DataError(f"{tar} sample {key}: {problem}; it holds {held}{dots if texts else ''}")


def _is_image(extension: str) -> bool:
    return extension.split(".")[-1] in IMAGE_EXTENSIONS


def _image_order(extension: str) -> tuple[list[str | tuple[int, str]], str]:
    """Return a sort key that compares numbers in a name by value: image_2 before image_10."""
    parts = [part.lstrip("0") for part in re.split("([0-9]+)", extension)]
    return [(len(p), p) if n % 2 else p for n, p in enumerate(parts)], extension


def _members(file: BinaryIO, tar: Path) -> Iterator[tuple[str, Span]]:
    """Yield name and span of the regular members of a tar file; directories are skipped."""
    total = os.fstat(file.fileno()).st_size
    offset, long_name = 0, ""
    while True:
        with located(f"{tar} byte {offset}"):
            file.seek(offset)
            block = file.read(BLOCK)
            if len(block) < BLOCK:
                what = "the file ends without tar's end mark" if offset else "no tar header"
                raise DataError(f"not a readable tar: {what}; is it truncated?")
            if not any(block):
                rest = iter(lambda: file.read(2**20), b"")
                if long_name or any(piece.strip(b"\0") for piece in rest):
                    raise DataError("more data after the end mark; expected a single tar")
                return
            name, kind, size = _parse_header(block)
            data = offset + BLOCK
            offset = data + -(-size // BLOCK) * BLOCK
            if kind in (_LONG_NAME, _PAX, _PAX_GLOBAL):
                if size > MAX_EXTRA_BYTES or data + size > total:
                    raise DataError(f"a header record of {size} bytes; the tar is damaged")
                long_name = _extra(file.read(size), kind) or long_name
                continue
            name, long_name = long_name or name, ""
            if kind in _REGULAR:
                if data + size > total:
                    sample = printable(_sample_key(name)[0], 400)
                    short = f"{max(0, total - data)} of {size} bytes; the shard is truncated"
                    raise DataError(f"sample {sample}: {short}")
                yield name, (data, size)
            elif kind != _FOLDER:
                what = _REJECTED.get(kind, f"of type {kind!r}")
                raise DataError(f"member {shown(name)} is {what}; expected regular files")


def _parse_header(block: bytes) -> tuple[str, bytes, int]:
    """Return name, type flag and size (bytes) of a header block."""
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise DataError(f"not a tar header ({error})") from None
    if not 0 <= header.size < 2**63:
        raise DataError(f"not a tar header (size is {header.size})")
    return header.name, header.type, header.size


def _extra(data: bytes, kind: bytes) -> str:
    """Return the name that a GNU long name or pax record gives the next member, or ""."""
    if kind == _LONG_NAME:
        return _text(data)
    name = ""
    while data.strip(b"\0"):
        length, _, _ = data.partition(b" ")
        size = int(length) if length.isdigit() and len(length) < 7 else 0
        record, data = data[:size], data[size:]
        key, mark, value = record[len(length) + 1 : -1].partition(b"=")
        if not mark or record[-1:] != b"\n":
            raise DataError("a pax record that cannot be read")
        is_global_path = key == b"path" and kind == _PAX_GLOBAL
        if is_global_path or key in (b"size", b"linkpath") or key.startswith(b"GNU.sparse"):
            raise DataError(f"pax record {shown(key)}; expected plain regular files")
        if key == b"path":
            name = _text(value)
    return name


def _text(field: bytes) -> str:
    """Decode a name; bytes that are not UTF-8 become characters that `scan` rejects."""
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")
