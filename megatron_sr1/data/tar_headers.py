"""Minimal tar reader: finds the regular members of a file and rejects everything else.

In: a tar in ustar, GNU or pax format. Out: name, offset and size of each regular member. Python's
own tarfile follows links, sparse maps and pax records of any length, some of them in quadratic
time, and stops silently at a broken header. Here each header advances through the file, members
that cannot hold a sample are rejected by name, and the last member must be followed by the end
mark. Source: POSIX.1-2001, pax interchange format.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from megatron_sr1.data.guards import printable, shown
from megatron_sr1.errors import DataError

BLOCK = 512
MAX_EXTRA_BYTES = 64 * 1024
"""Limit of a pax record or a GNU long name."""
_REGULAR = (b"0", b"\0", b"7")
_KINDS = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a character device",
    b"4": "a block device",
    b"6": "a FIFO",
    b"S": "a sparse file",
    b"K": "a long link",
    b"M": "a part of a split file",
}
_LONG_NAME, _PAX, _PAX_GLOBAL, _FOLDER = b"L", b"x", b"g", b"5"


@dataclass(frozen=True)
class Header:
    """A header block: `kind` is its type flag, `size` the number of bytes after it."""

    name: str
    kind: bytes
    size: int


@dataclass(frozen=True)
class Member:
    """A regular member: its name, and the offset and size of its data in bytes."""

    name: str
    offset: int
    size: int


def members(tar: Path) -> Iterator[Member]:
    """Yield the regular members of a tar file, in order; directories are skipped.

    Raises:
        DataError: not a tar, truncated, damaged, or with members that cannot hold a sample.
    """
    try:
        if not tar.is_file():  # opening a pipe would block
            raise DataError(f"{tar}: not a regular file; expected a tar")
        with open(tar, "rb") as file:
            yield from _walk(file, tar)
    except OSError as error:
        raise DataError(f"{tar}: not a readable tar: {error.strerror}") from None


def parse_header(block: bytes, where: str) -> Header:
    """Parse a header block.

    Raises:
        DataError: its checksum, size or name is invalid.
    """
    wanted = _octal(block[148:156], where, "checksum")
    if len(block) != BLOCK or wanted != sum(block) - sum(block[148:156]) + 8 * 32:
        raise DataError(f"{where}: not a tar header (its checksum differs)")
    name = _text(block[:100], where)
    if block[257:265] == b"ustar\x0000" and block[345] and block[156:157] not in (_PAX, b"g"):
        name = f"{_text(block[345:500], where)}/{name}"
    return Header(name, block[156:157], _octal(block[124:136], where, "size"))


def _walk(file: BinaryIO, tar: Path) -> Iterator[Member]:
    total = os.fstat(file.fileno()).st_size
    offset, long_name = 0, ""
    while True:
        where = f"{tar} byte {offset}"
        block = _at(file, offset, BLOCK)
        if len(block) < BLOCK:
            what = "the file ends without tar's end mark" if offset else "no tar header"
            raise DataError(f"{where}: not a readable tar: {what}; is it truncated?")
        if not any(block):
            if long_name or not _only_zeros(file, offset):
                raise DataError(f"{where}: more data after the end mark; expected a single tar")
            return
        header = parse_header(block, where)
        data = offset + BLOCK
        offset = data + -(-header.size // BLOCK) * BLOCK
        if header.kind in (_LONG_NAME, _PAX, _PAX_GLOBAL):
            long_name = _extra(_at(file, data, header.size), header, where) or long_name
            continue
        name = long_name or header.name
        if header.kind in _REGULAR:
            if data + header.size > total:
                short = f"{max(0, total - data)} of {header.size} bytes; the shard is truncated"
                raise DataError(f"{tar} sample {printable(sample_key(name)[0])}: {short}")
            yield Member(name, data, header.size)
        elif header.kind != _FOLDER:
            kind = _KINDS.get(header.kind, f"of type {header.kind!r}")
            raise DataError(f"{where}: member {shown(name)} is {kind}; expected regular files")
        long_name = ""


def sample_key(name: str) -> tuple[str, str]:
    """Split a member's name at its first dot into (key, extension)."""
    folder, _, last = name.rpartition("/")
    key, _, extension = last.partition(".")
    return (f"{folder}/{key}" if folder else key), extension.lower()


def _extra(data: bytes, header: Header, where: str) -> str:
    """Return the name that a GNU long name or pax record gives the next member, or ""."""
    if header.size > MAX_EXTRA_BYTES or len(data) < header.size:
        raise DataError(f"{where}: a header record of {header.size} bytes; the tar is damaged")
    if header.kind == _LONG_NAME:
        return _text(data, where)
    name = ""
    while data.strip(b"\0"):
        length, _, _ = data.partition(b" ")
        size = int(length) if length.isdigit() and len(length) < 7 else 0
        record, data = data[:size], data[size:]
        key, mark, value = record[len(length) + 1 : -1].partition(b"=")
        if not mark or record[-1:] != b"\n":
            raise DataError(f"{where}: a pax record that cannot be read")
        if (
            key in (b"size", b"linkpath")
            or key.startswith(b"GNU.sparse")
            or (key == b"path" and header.kind == _PAX_GLOBAL)
        ):
            raise DataError(f"{where}: pax record {shown(key)}; expected plain regular files")
        if key == b"path":
            name = _text(value, where)
    return name


def _text(field: bytes, where: str) -> str:
    name = field.partition(b"\0")[0]
    try:
        return name.decode()
    except UnicodeDecodeError:
        raise DataError(f"{where}: member name {shown(name)} is not UTF-8") from None


def _octal(field: bytes, where: str, what: str) -> int:
    digits = field.strip(b" \0") or b"0"
    if not digits.isdigit() or b"8" in digits or b"9" in digits:
        raise DataError(f"{where}: not a tar header ({what} is {shown(field)})")
    return int(digits, 8)


def _at(file: BinaryIO, offset: int, size: int) -> bytes:
    file.seek(offset)
    return file.read(min(size, MAX_EXTRA_BYTES))


def _only_zeros(file: BinaryIO, offset: int) -> bool:
    file.seek(offset)
    while piece := file.read(2**20):
        if piece.count(0) != len(piece):
            return False
    return True
