"""Webdataset shards: tar files of samples with random access by sample number.

A directory holds `shard-000000.tar`, … with members `KEY.json`, `KEY.0.png`, `KEY.1.jpeg`, …;
`dataset.json` with the number of samples per shard; and an index of each tar, by which a member is
read in one operation. Any webdataset reader can stream the same files. Members are never extracted
to files.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
import threading
from bisect import bisect_right
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image

from megatron_sr1.data.examples import (
    Record,
    example_from_stored,
    stored,
)
from megatron_sr1.data.guards import (
    MAX_IMAGE_BYTES,
    MAX_JSON_BYTES,
    parse_json,
    read_file,
    shown,
)
from megatron_sr1.data.images import decode_image, image_format
from megatron_sr1.data.shard_index import (
    Place,
    check_header,
    read_index,
    write_index,
    write_json,
)
from megatron_sr1.data.tar_headers import BLOCK
from megatron_sr1.errors import DataError
from megatron_sr1.records import Example

DATASET_FILE = "dataset.json"
NUM_SEARCHED = 100
"""First samples that are searched for an image, where rollout.canary_bound needs one."""
MAX_OPEN_SHARDS = 256


def write_shards(
    samples: Iterable[Record], directory: str | Path, *, samples_per_shard: int = 1000
) -> int:
    """Write samples as numbered shards with their indices and `dataset.json`.

    Args:
        samples: samples in the order of their numbers.
        directory: created if needed; must not hold shards, except those of an interrupted call.
        samples_per_shard: samples per tar.

    Returns:
        number of samples written.

    Raises:
        DataError: the directory already holds shards, or there are no samples.
    """
    target = Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    if _tars(target) or (target / DATASET_FILE).exists():
        if not _is_incomplete(target):
            raise DataError(
                f"{target}: already holds shards; choose another directory or remove them"
            )
        for leftover in [*target.glob("shard-*.tar*"), *target.glob("shard-*.index.json")]:
            leftover.unlink()
    iterator = iter(enumerate(samples))
    counts: list[dict[str, Any]] = []
    write_json(target / DATASET_FILE, {"format": 1, "complete": False})  # until the last shard
    while (first := next(iterator, None)) is not None:
        path = target / f"shard-{len(counts):06d}.tar"
        part = path.with_suffix(".tar.part")
        with tarfile.open(part, "w", format=tarfile.USTAR_FORMAT) as tar:
            places = [_add(tar, *first)]
            while len(places) < samples_per_shard and (entry := next(iterator, None)) is not None:
                places.append(_add(tar, *entry))
        os.replace(part, path)
        counts.append({"file": path.name, "samples": len(places)})
        write_index(path, places)
    if not counts:
        (target / DATASET_FILE).unlink()
        raise DataError(f"{target}: no samples to write")
    total = sum(count["samples"] for count in counts)
    write_json(
        target / DATASET_FILE,
        {"format": 1, "complete": True, "num_samples": total, "shards": counts},
    )
    return total


class ShardReader:
    """Random access to a directory of shards. Safe to share between threads and forks."""

    def __init__(self, directory: str | Path) -> None:
        """Open a directory of shards.

        Args:
            directory: written by `write_shards` or another webdataset writer.

        Raises:
            DataError: no shards, or `dataset.json` does not match them.
        """
        self.directory = Path(directory)
        tars = _tars(self.directory)
        if not tars:
            raise DataError(
                f"{self.directory}: no .tar shards; make them with tools/make_shards.py"
            )
        self._places: dict[Path, list[Place]] = {}
        self._files: dict[Path, int] = {}
        self._lock = threading.Lock()
        counts = _counts(self.directory, tars)
        self._tars = tars
        self._ends: list[int] = []
        for number, tar in enumerate(tars):
            size = counts[number] if counts else len(self._index(tar))
            self._ends.append(size + (self._ends[-1] if self._ends else 0))

    def __len__(self) -> int:
        """Return the number of samples in all shards."""
        return self._ends[-1]

    def example(self, index: int) -> Example:
        """Read a sample without its images.

        Raises:
            IndexError: no sample has this number.
            DataError: the stored sample cannot be read; names shard and sample.
        """
        tar, place = self._locate(index)
        value = parse_json(self._read(tar, place, place.text), f"{tar} sample {place.key}")
        example = example_from_stored(value, index=index, key=place.key, shard=str(tar))
        if example.num_images != len(place.images):
            raise DataError(
                f"{tar} sample {place.key}: its JSON names {example.num_images} images, the shard "
                f"holds {len(place.images)}"
            )
        return example

    def images(self, index: int) -> list[Image.Image]:
        """Read and decode the images of a sample, in order, as RGB.

        Raises:
            IndexError: no sample has this number.
            DataError: an image does not decode; names shard, sample and image.
        """
        tar, place = self._locate(index)
        return [
            decode_image(data, f"{tar} sample {place.key}, image {number}")
            for number, data in enumerate(self.image_files(index))
        ]

    def image_files(self, index: int) -> list[bytes]:
        """Read the image files of a sample as stored."""
        tar, place = self._locate(index)
        return [self._read(tar, place, span) for span in place.images]

    def _locate(self, index: int) -> tuple[Path, Place]:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.directory}: sample {index} of {len(self)}")
        number = bisect_right(self._ends, index)
        start = self._ends[number - 1] if number else 0
        places = self._index(self._tars[number])
        if len(places) != self._ends[number] - start:
            raise DataError(
                f"{self._tars[number]}: {len(places)} samples, {DATASET_FILE} says "
                f"{self._ends[number] - start}; the shard is not the one that was written"
            )
        return self._tars[number], places[index - start]

    def _index(self, tar: Path) -> list[Place]:
        if tar not in self._places:
            self._places[tar] = read_index(tar)
        return self._places[tar]

    def _read(self, tar: Path, place: Place, span: tuple[int, int]) -> bytes:
        """Read a member and check its header, as the index may be wrong."""
        offset, size = span
        where = f"{tar} sample {place.key}"
        limit = MAX_JSON_BYTES if span == place.text else MAX_IMAGE_BYTES
        if size > limit:
            raise DataError(f"{where}: a member of {size} bytes, at most {limit}")
        begin, length = offset - BLOCK, size + BLOCK
        try:
            with self._lock:
                file = self._files.get(tar)
                if file is None and len(self._files) < MAX_OPEN_SHARDS:
                    file = self._files[tar] = os.open(tar, os.O_RDONLY)
            # pread uses no shared file position, so threads and forks can read concurrently.
            data = _read_once(tar, begin, length) if file is None else os.pread(file, length, begin)
        except OSError as error:
            raise DataError(f"{where}: {error.strerror}") from None
        if len(data) != length:
            raise DataError(
                f"{where}: {max(0, len(data) - BLOCK)} of {size} bytes; the shard is truncated"
            )
        check_header(data[:BLOCK], place, span, where)
        return data[BLOCK:]

    def close(self) -> None:
        """Close the files of the shards; they are reopened on the next read."""
        with self._lock:
            for file in self._files.values():
                os.close(file)
            self._files.clear()


def _read_once(tar: Path, offset: int, size: int) -> bytes:
    with open(tar, "rb") as file:
        file.seek(offset)
        return file.read(size)


def _tars(directory: Path) -> list[Path]:
    found = sorted(directory.glob("*.tar"))
    for path in found:
        if not path.is_file():
            raise DataError(f"{path}: not a regular file; expected shards")
    return found


def _dataset(directory: Path) -> Any:
    path = directory / DATASET_FILE
    return parse_json(read_file(path, MAX_JSON_BYTES, str(directory)), str(path))


def _is_incomplete(directory: Path) -> bool:
    """Return True if an interrupted `write_shards` left these shards."""
    try:
        value = _dataset(directory)
    except DataError:
        return False
    return isinstance(value, dict) and value.get("complete") is False


def _counts(directory: Path, tars: list[Path]) -> list[int] | None:
    """Return the samples per shard from `dataset.json`, or None if there is no such file."""
    path = directory / DATASET_FILE
    if not path.is_file():
        return None
    value = _dataset(directory)
    if _is_incomplete(directory):
        raise DataError(f"{directory}: writing these shards was cut short; make them again")
    try:
        counts = {str(s["file"]): s["samples"] for s in value["shards"]}
    except (LookupError, TypeError) as error:
        reason = shown(f"{type(error).__name__}: {error}")
        raise DataError(f"{path}: not readable: {reason}; remove it to count again") from None
    if set(counts) != {t.name for t in tars}:
        odd = sorted(set(counts) ^ {t.name for t in tars})
        raise DataError(f"{path}: shards listed and shards there differ: {shown(odd)}")
    for tar in tars:  # a sample takes at least a header and a block of JSON
        count, most = counts[tar.name], tar.stat().st_size // (2 * BLOCK)
        if type(count) is not int or not 0 <= count <= most:
            raise DataError(
                f"{path}: {shown(count)} samples in {tar.name}, which holds {most} at most; "
                "remove it to count again"
            )
    total = value.get("num_samples")
    if total != sum(counts.values()):  # a wrong count would shift sample numbers
        raise DataError(
            f"{path}: {sum(counts.values())} samples in the shards, num_samples is {shown(total)}; "
            "remove it to count again"
        )
    return [counts[t.name] for t in tars]


def _add(tar: tarfile.TarFile, number: int, record: Record) -> Place:
    """Append a sample to a shard and return its position."""
    key = f"{number:09d}"
    text = json.dumps(stored(record), ensure_ascii=False).encode()
    files = [(f"{key}.json", text)]
    for position, data in enumerate(record.images):
        kind = image_format(data, f"sample {key}, image {position}")
        files.append((f"{key}.{position}.{kind}", data))
    spans = []
    for name, data in files:
        member = tarfile.TarInfo(name)
        member.size = len(data)
        spans.append((tar.offset + tarfile.BLOCKSIZE, len(data)))  # short names: a one-block header
        tar.addfile(member, io.BytesIO(data))
    return Place(key, spans[0], tuple(spans[1:]))
