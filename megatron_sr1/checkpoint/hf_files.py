"""Hugging Face model directories: read by their safetensors headers, and written like the source.

In: a directory with `model.safetensors.index.json` or a single `model.safetensors`, or the copy of
one without weights that a Megatron checkpoint carries. Out: names, shapes and dtypes of all
tensors, blocks of them on demand, and directories with the same files and other weights. A
directory gets its name only after everything in it is on the disk.

The format is a little-endian 8-byte length, a JSON header, and the tensors' bytes
(https://github.com/huggingface/safetensors). Headers are kept as bytes: a file that is written
again with the same header is the same file, and one tensor at a time is enough to write it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import torch

from megatron_sr1.checkpoint.disk import expect_pages
from megatron_sr1.checkpoint.folders import INDEX, SINGLE
from megatron_sr1.checkpoint.mapping import canonical_hf_name
from megatron_sr1.checkpoint.transforms import Slice
from megatron_sr1.errors import CheckpointError

HEADER_SUFFIX = ".header"  # of a weight file's header, where the weights are kept elsewhere
MAX_HEADER_BYTES = 100_000_000
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".msgpack", ".h5", ".onnx")
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor is.

    Attributes:
        name: in the file.
        file: name of the file.
        dtype: of the values.
        shape: of the tensor.
        begin: first byte, counted from the file's start.
        num_bytes: length.
    """

    name: str
    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    num_bytes: int


class HFSource:
    """A Hugging Face directory.

    Args:
        directory: with weights, or with their headers only.

    Attributes:
        headers: raw header of each weight file, its length field included.
        tensors: all tensors by their published name.
    """

    def __init__(self, directory: str | Path) -> None:
        """Read all headers.

        Raises:
            CheckpointError: no weights, or a file that is absent, cut off or not safetensors.
        """
        self.directory = Path(directory)
        self.headers = {name: self._read_header(name) for name in self._weight_files()}
        self.tensors: dict[str, StoredTensor] = {}
        for file, header in self.headers.items():
            for tensor in _parse_header(self.directory / file, header):
                published = canonical_hf_name(tensor.name)
                if published in self.tensors:
                    twin = self.tensors[published]
                    raise CheckpointError(
                        f"{self.directory}: tensor {published} is there twice, as {twin.name} in "
                        f"{twin.file} and as {tensor.name} in {file}; remove one"
                    )
                self.tensors[published] = tensor

    @cached_property
    def has_weights(self) -> bool:
        """Whether the values are here, not only the headers."""
        return all((self.directory / name).is_file() for name in self.headers)

    def read(self, wanted: Slice) -> torch.Tensor:
        """A block of a tensor, in the type of the file."""
        from safetensors import safe_open

        stored = self.tensors[wanted.hf_name]
        with safe_open(str(self.directory / stored.file), framework="pt") as file:
            view = file.get_slice(stored.name)
            if wanted.rows is not None:
                return view[wanted.rows[0] : wanted.rows[1]]
            if wanted.columns is not None:
                return view[:, wanted.columns[0] : wanted.columns[1]]
            with (self.directory / stored.file).open("rb") as whole:
                expect_pages(whole.fileno(), stored.begin, stored.num_bytes)
            return file.get_tensor(stored.name)

    def other_files(self) -> list[Path]:
        """Files beside the weights, relative to the directory; not those of hidden folders."""
        found = []
        for folder, subfolders, names in os.walk(self.directory):
            subfolders[:] = sorted(s for s in subfolders if not s.startswith("."))
            for name in sorted(names):
                ours = name.endswith(HEADER_SUFFIX)
                if not ours and not name.endswith(WEIGHT_SUFFIXES):
                    found.append((Path(folder) / name).relative_to(self.directory))
        return found

    def copy_other_files(self, target: Path) -> None:
        """Copy the files beside the weights, byte for byte."""
        for name in self.other_files():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.directory / name, target / name)

    def copy_without_weights(self, target: Path) -> None:
        """Copy the files beside the weights, and of the weight files their headers."""
        self.copy_other_files(target)
        for name, header in self.headers.items():
            (target / (name + HEADER_SUFFIX)).write_bytes(header)

    def _weight_files(self) -> list[str]:
        index = self.directory / INDEX
        if index.is_file():
            return _read_index(index)
        for name in (SINGLE, SINGLE + HEADER_SUFFIX):
            if (self.directory / name).is_file():
                return [SINGLE]
        found = sorted(p.name for p in self.directory.glob("*")) if self.directory.is_dir() else []
        raise CheckpointError(
            f"{self.directory}: no weights; looked for {INDEX} and {SINGLE}, found "
            f"{', '.join(found[:12]) or 'nothing'}; save other formats as safetensors first"
        )

    def _read_header(self, name: str) -> bytes:
        path = self.directory / name
        alone = self.directory / (name + HEADER_SUFFIX)
        if not path.is_file() and alone.is_file():
            return alone.read_bytes()
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file, but {INDEX} names it; fetch it again")
        with path.open("rb") as file:
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            size = path.stat().st_size
            if len(prefix) < 8 or length > min(MAX_HEADER_BYTES, size - 8):
                raise CheckpointError(
                    f"{path}: not a safetensors file, or cut off ({size} bytes); fetch it again"
                )
            header = prefix + file.read(length)
        last = max((t.begin + t.num_bytes for t in _parse_header(path, header)), default=0)
        if last > size:
            raise CheckpointError(
                f"{path}: cut off at {size} bytes, its header names {last}; fetch it again"
            )
        return header


def _read_index(index: Path) -> list[str]:
    """Names of the weight files that an index names."""
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError):
        raise CheckpointError(f"{index}: expected JSON with a weight_map of names") from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(f"{index}: {name!r} is not the name of a file beside it")
    return names


def _parse_header(path: Path, header: bytes) -> list[StoredTensor]:
    """All tensors that a header names.

    Raises:
        CheckpointError: no JSON of the expected form, or values that are not floating point.
    """
    found = []
    try:
        content: dict[str, Any] = json.loads(header[8:])
        for name, entry in content.items():
            if name == "__metadata__":
                continue
            if entry["dtype"] not in DTYPES:
                raise CheckpointError(
                    f"{path}: tensor {name} has type {entry['dtype']}; expected one of "
                    f"{', '.join(DTYPES)} (quantised weights must be expanded first)"
                )
            begin, end = entry["data_offsets"]
            dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
            if begin < 0 or end - begin != dtype.itemsize * torch.Size(shape).numel():
                raise CheckpointError(f"{path}: tensor {name}: offsets and shape {shape} disagree")
            found.append(
                StoredTensor(name, path.name, dtype, shape, len(header) + begin, end - begin)
            )
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{path}: its header is not that of a safetensors file") from None
    return found


def check_target(source: HFSource, target: Path) -> None:
    """Refuse a target that would harm something else.

    Raises:
        CheckpointError: a file, a folder that holds no model, or a folder inside the source.
    """
    if source.directory.resolve() in target.resolve().parents:
        raise CheckpointError(
            f"{target} lies inside the source {source.directory}; write elsewhere"
        )
    if not target.exists():
        return
    if not target.is_dir():
        raise CheckpointError(f"{target} is a file; name a folder for the model")
    if any(target.iterdir()) and not (target / "config.json").is_file():
        raise CheckpointError(
            f"{target} is not empty and holds no model (no config.json); name another folder"
        )


def write_like(source: HFSource, target: Path, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Write weights into a directory like the source's; on one rank.

    Args:
        source: gives headers and all other files.
        target: replaced if it is there.
        weights: (published name, whole tensor), every tensor of the source once.

    Raises:
        CheckpointError: a tensor did not come or does not fit.
    """
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    source.copy_other_files(partial)
    awaited = dict(source.tensors)
    with ExitStack() as stack:
        files: dict[str, BinaryIO] = {}
        for name, header in source.headers.items():
            files[name] = stack.enter_context((partial / name).open("wb"))
            files[name].write(header)
        for name, tensor in weights:
            stored = awaited.pop(name, None)
            if stored is None:
                raise CheckpointError(f"{source.directory} has no tensor {name} to be written")
            write_tensor(files[stored.file], stored, tensor)
        if awaited:
            raise CheckpointError(f"{target}: no values came for {', '.join(list(awaited)[:12])}")
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
    replace_directory(partial, target)


def replace_directory(new: Path, target: Path) -> None:
    """Give a finished directory its name; an older one of that name goes afterwards."""
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    new.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def write_tensor(file: BinaryIO, stored: StoredTensor, tensor: torch.Tensor) -> None:
    """Write a tensor to its place in a weight file.

    Raises:
        CheckpointError: it is of another shape.
    """
    if tuple(tensor.shape) != stored.shape:
        raise CheckpointError(
            f"{stored.name}: {list(tensor.shape)} came, {stored.file} has {list(stored.shape)}"
        )
    values = tensor.detach().to("cpu", stored.dtype).contiguous()
    file.seek(stored.begin)
    file.write(memoryview(values.view(torch.uint8).numpy()))
