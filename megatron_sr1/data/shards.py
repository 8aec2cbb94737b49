"""Webdataset shards: tar files of samples with random access by sample number.

A directory holds `shard-000000.tar`, … with members `KEY.json`, `KEY.0.png`, `KEY.1.jpeg`, …;
`dataset.json` with the number of samples per shard; and an index of each tar, by which a member is
read in one operation. Any webdataset reader can stream the same files.
"""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import json
import os
import tarfile
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from PIL import Image

from megatron_sr1.data.examples import Record, example_from_stored, stored
from megatron_sr1.data.guards import (
    MAX_IMAGE_BYTES,
    MAX_JSON_BYTES,
    located,
    parse_json,
    read_json,
    shown,
)
from megatron_sr1.data.images import decode_image, file_extension
from megatron_sr1.data.shard_index import (
    BLOCK,
    Place,
    Span,
    check_header,
    index_path,
    read_index,
    write_index,
)
from megatron_sr1.errors import ConfigError, DataError
from megatron_sr1.records import Example
from megatron_sr1.runtime.files import replacing, write_text

DATASET_FILE = "dataset.json"
Files = Mapping[str, bytes]
"""The files of a sample by the extensions of their names: json first, then 0.png and so on."""
NUM_SEARCHED = 100
"""First samples of a set that are searched for an image, where rollout.canary_bound needs one."""


def write_shards(
    samples: Iterable[Record], directory: str | Path, *, samples_per_shard: int = 1000
) -> int:
    """Write samples as numbered shards with their indices and `dataset.json`; return their number.

    The directory is created if needed. It must not hold shards, except those of an interrupted
    call, and there must be samples.
    """
    return write_files(_encoded(samples), directory, samples_per_shard)


def _encoded(samples: Iterable[Record]) -> Iterator[Files]:
    for number, record in enumerate(samples):
        with located(f"sample {number:09d}"):
            files = encode(record)
        yield files


def encode(record: Record) -> Files:
    """Return the files of a sample."""
    files = {"json": json.dumps(stored(record), ensure_ascii=False).encode()}
    known = dict(enumerate(record.info))
    for place, data in enumerate(record.images):
        with located(f"image {place}"):
            extension = known[place].extension if known else file_extension(data)
            files[f"{place}.{extension}"] = data
    return files


def write_files(
    samples: Iterable[Files],
    directory: str | Path,
    samples_per_shard: int,
    whole: Sequence[Mapping[str, Any]] = (),
    state: Callable[[], Any] = lambda: None,
) -> int:
    """Write shards as `write_shards` does, of encoded samples; a later call can continue.

    Args:
        samples: those after the shards in `whole`.
        directory: where to write.
        samples_per_shard: 1 or more.
        whole: shards of an interrupted call to keep, from `interrupted`.
        state: returns a JSON value, which is saved with each shard for `interrupted`.
    """
    target = Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    shards = list(whole)
    if _is_incomplete(target):
        _remove_leftovers(target, {shard["file"] for shard in shards})
    elif _tars(target) or (target / DATASET_FILE).exists():
        raise DataError(f"{target}: already holds shards; choose another directory or remove them")
    numbered = enumerate(samples, sum(shard["samples"] for shard in shards))
    _write_dataset(target, {"complete": False, "shards": shards, "state": state()})
    while first := next(numbered, None):
        path = target / f"shard-{len(shards):06d}.tar"
        entries = itertools.chain([first], itertools.islice(numbered, samples_per_shard - 1))
        with replacing(path) as part, tarfile.open(part, "w", format=tarfile.USTAR_FORMAT) as tar:
            places = [_add(tar, *entry) for entry in entries]
        shards.append({"file": path.name, "samples": len(places)})
        write_index(path, places)
        _write_dataset(target, {"complete": False, "shards": shards, "state": state()})
    if not shards:
        (target / DATASET_FILE).unlink()
        raise DataError(f"{target}: no samples to write")
    total = sum(shard["samples"] for shard in shards)
    _write_dataset(target, {"complete": True, "num_samples": total, "shards": shards})
    return int(total)


def interrupted(directory: Path) -> tuple[list[Mapping[str, Any]], Any]:
    """Return the whole shards and the state that an interrupted `write_files` left; [], None."""
    if not _is_incomplete(directory):
        return [], None
    value = read_json(directory / DATASET_FILE)
    shards, state = value.get("shards", []), value.get("state")
    try:
        is_whole = all(len(read_index(directory / s["file"])) == s["samples"] for s in shards)
    except (DataError, OSError):
        is_whole = False
    return (shards, state) if is_whole else ([], None)


def _remove_leftovers(target: Path, kept: Set[str]) -> None:
    """Remove what an interrupted call left, but the shards to keep."""
    kept = {file for name in kept for file in (name, index_path(target / name).name)}
    for pattern in ("shard-*.tar*", "shard-*.index.json", ".*.partial"):
        for leftover in target.glob(pattern):
            if leftover.name not in kept:
                leftover.unlink()


class ShardReader:
    """Random access to directories of shards. Safe to share between threads and forks.

    A number without a sample is an `IndexError`, a sample that cannot be read a `DataError`.

    Attributes:
        sizes: number of samples in each directory; those of one follow those of the one before.
    """

    def __init__(self, *directories: str | Path) -> None:
        """Open directories of shards, written by `write_shards` or another webdataset writer."""
        self._directories = directories
        self._index = functools.cache(read_index)
        self._open = functools.lru_cache(64)(functools.partial(open, mode="rb", buffering=0))
        self._tars: list[Path] = []
        self.sizes: list[int] = []
        counts: list[int] = []
        for directory in map(Path, directories):
            tars = _tars(directory)
            if not tars:
                raise DataError(f"{directory}: no .tar shards; make them with tools/make_shards.py")
            own = _counts(directory, tars) or [len(self._index(tar)) for tar in tars]
            self._tars += tars
            self.sizes.append(sum(own))
            counts += own
        self._ends = list(itertools.accumulate(counts))

    def __len__(self) -> int:
        """Return the number of samples in all shards."""
        return self._ends[-1]

    def example(self, index: int) -> Example:
        """Read a sample without its images."""
        tar, place = self._locate(index)
        with located(f"{tar} sample {place.key}"):
            value = parse_json(self._read(tar, place, place.text))
            example = example_from_stored(value, index=index, key=place.key, shard=str(tar))
            named, held = example.num_images, len(place.images)
            if named != held:
                raise DataError(f"its JSON names {named} images, the shard holds {held}")
            return example

    def images(self, index: int) -> list[Image.Image]:
        """Read and decode the images of a sample, in order, as RGB."""
        tar, place = self._locate(index)
        images = []
        for number, data in enumerate(self.image_files(index)):
            with located(f"{tar} sample {place.key}: image {number}"):
                images.append(decode_image(data))
        return images

    def image_files(self, index: int) -> list[bytes]:
        """Read the image files of a sample as stored."""
        tar, place = self._locate(index)
        with located(f"{tar} sample {place.key}"):
            return [self._read(tar, place, span) for span in place.images]

    def _read(self, tar: Path, place: Place, span: Span) -> bytes:
        """Read a member and check its header, as the index may be wrong."""
        offset, size = span
        limit = MAX_JSON_BYTES if span == place.text else MAX_IMAGE_BYTES
        if size > limit:
            raise DataError(f"a member of {size} bytes, at most {limit}")
        try:
            file = self._open(tar)  # kept until it is read: another thread may evict it
            data = os.pread(file.fileno(), size + BLOCK, offset - BLOCK)
        except OSError as error:
            raise DataError(error.strerror) from None
        if len(data) != size + BLOCK:
            held = max(0, len(data) - BLOCK)
            raise DataError(f"{held} of {size} bytes; the shard is truncated")
        check_header(data[:BLOCK], place, span)
        return data[BLOCK:]

    def _locate(self, index: int) -> tuple[Path, Place]:
        if not 0 <= index < len(self):
            where = ", ".join(map(str, self._directories))
            raise IndexError(f"{where}: sample {index} of {len(self)}")
        number = bisect_right(self._ends, index)
        tar, start = self._tars[number], self._ends[number - 1] if number else 0
        places, count = self._index(tar), self._ends[number] - start
        if len(places) != count:
            said = f"{len(places)} samples, {DATASET_FILE} says {count}"
            raise DataError(f"{tar}: {said}; the shard is not the one that was written")
        return tar, places[index - start]


def _tars(directory: Path) -> list[Path]:
    found = sorted(directory.glob("*.tar"))
    for path in found:
        if not path.is_file():
            raise DataError(f"{path}: not a regular file; expected shards")
    return found


def _write_dataset(directory: Path, value: dict[str, Any]) -> None:
    write_text(directory / DATASET_FILE, json.dumps({"format": 1, **value}) + "\n")


def _is_incomplete(directory: Path) -> bool:
    """Return True if an interrupted `write_shards` left these shards."""
    with contextlib.suppress(DataError, AttributeError):  # no such file, or not an object
        return read_json(directory / DATASET_FILE).get("complete") is False
    return False


def _counts(directory: Path, tars: list[Path]) -> list[int] | None:
    """Return the samples per shard from `dataset.json`, or None if there is no such file."""
    path = directory / DATASET_FILE
    if not path.is_file():
        return None
    if _is_incomplete(directory):
        raise DataError(f"{directory}: writing these shards was cut short; make them again")
    value = read_json(path)
    try:
        counts = {str(s["file"]): s["samples"] for s in value["shards"]}
        odd = sorted(counts.keys() ^ {t.name for t in tars})
        if odd:
            raise DataError(f"{path}: shards listed and shards there differ: {shown(odd)}")
        for tar in tars:  # a sample takes at least a header and a block of JSON
            count, most = counts[tar.name], tar.stat().st_size // (2 * BLOCK)
            if type(count) is not int or not 0 <= count <= most:
                raise ValueError(f"{tar.name}: {shown(count)} samples, of {most} at most")
        if sum(counts.values()) != value["num_samples"]:  # would shift sample numbers
            raise ValueError("the samples of the shards do not add up to num_samples")
    except (LookupError, TypeError, ValueError) as error:
        reason = shown(f"{type(error).__name__}: {error}", 200)
        raise DataError(f"{path}: not readable: {reason}; remove it to count again") from None
    return [counts[t.name] for t in tars]


def _add(tar: tarfile.TarFile, number: int, files: Files) -> Place:
    """Append a sample to a shard and return its position."""
    key, spans = f"{number:09d}", []
    for extension, data in files.items():
        member = tarfile.TarInfo(f"{key}.{extension}")
        member.size = len(data)
        spans.append((tar.offset + tarfile.BLOCKSIZE, len(data)))  # short names: a one-block header
        tar.addfile(member, io.BytesIO(data))
    return Place(key, spans[0], tuple(spans[1:]))


def first_with_image(sizes: Iterable[int], num_images: Callable[[int], int]) -> int:
    """Return the first sample with an image, which `rollout.canary_bound` compares.

    `sizes` are those of the training sets. `num_images` returns a sample's number of images, or
    raises a DataError if it cannot be used.
    """
    first = 0
    for size in sizes:
        for index in range(first, first + min(size, NUM_SEARCHED)):
            with contextlib.suppress(DataError):
                if num_images(index):
                    return index
        first += size
    raise ConfigError(
        f"rollout.canary_bound needs a sample with an image among the first {NUM_SEARCHED} of a "
        "training set, and there is none; set it to 0"
    )
