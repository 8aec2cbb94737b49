"""Hugging Face model directories: read by their safetensors headers, and written like the source.

A directory has `model.safetensors.index.json` or a single `model.safetensors`, or is the copy of
one without weights that a Megatron checkpoint carries. One that is written gets its name only after
everything in it is on the disk.

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

from megatron_sr1.checkpoint.disk import read_ahead
from megatron_sr1.checkpoint.folders import INDEX, SINGLE
from megatron_sr1.checkpoint.mapping import canonical_hf_name
from megatron_sr1.errors import CheckpointError

HEADER_SUFFIX = ".header"  # of a weight file's header, where the weights are kept elsewhere
MAX_HEADER_BYTES = 100_000_000
CHAT_TEMPLATE = "chat_template.jinja"
OLD_CHAT_TEMPLATE = "chat_template.json"  # if there is one, it is preferred
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".msgpack", ".h5", ".onnx")
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a weight file; `begin` counts from the file's start."""

    name: str
    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    num_bytes: int


class HFSource:
    """A Hugging Face directory, with weights or with their headers only.

    `headers` has each weight file's raw header, with its length field; `tensors` has all tensors by
    published name. Raises `CheckpointError` if a file is absent, cut off or not safetensors.
    """

    def __init__(self, directory: str | Path) -> None:
        """Read all headers."""
        self.directory = Path(directory)
        self.headers: dict[str, bytes] = {}
        self.tensors: dict[str, StoredTensor] = {}
        for file in self._weight_files():
            self.headers[file] = header = _read_header(self.directory / file)
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
        """True if the values are here, not only the headers."""
        return all((self.directory / name).is_file() for name in self.headers)

    def need_weights(self) -> None:
        """Raise `CheckpointError` if only the headers are here."""
        if not self.has_weights:
            raise CheckpointError(f"{self.directory}: headers of weight files, but not the weights")

    def read(self, name: str, block: tuple[slice, ...] = ()) -> torch.Tensor:
        """Read a tensor, or a block of it, in the type of the file."""
        from safetensors import safe_open

        stored = self.tensors[name]
        path = self.directory / stored.file
        with safe_open(str(path), framework="pt") as file:
            if block:
                return file.get_slice(stored.name)[block]
            with path.open("rb") as whole:
                read_ahead(whole.fileno(), stored.begin, stored.num_bytes)
            return file.get_tensor(stored.name)

    def copy_other_files(self, target: Path) -> None:
        """Copy all files but weights and those of hidden directories, byte for byte."""
        for folder, subfolders, names in os.walk(self.directory):
            subfolders[:] = [name for name in subfolders if not name.startswith(".")]
            copies = target / Path(folder).relative_to(self.directory)
            for name in names:
                if not name.endswith((HEADER_SUFFIX, *WEIGHT_SUFFIXES)):
                    copies.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(Path(folder) / name, copies / name)

    def copy_without_weights(self, target: Path) -> None:
        """Copy the other files, and the headers of the weight files."""
        self.copy_other_files(target)
        for name, header in self.headers.items():
            (target / (name + HEADER_SUFFIX)).write_bytes(header)

    def copy_with_chat_template(self, template: Path, target: Path) -> None:
        """Copy as `copy_without_weights`, a file in place of the chat template; on one rank."""
        partial = target.with_name(f".{target.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        self.copy_without_weights(partial)
        (partial / OLD_CHAT_TEMPLATE).unlink(missing_ok=True)
        shutil.copyfile(template, partial / CHAT_TEMPLATE)
        replace_directory(partial, target)

    def _weight_files(self) -> list[str]:
        index = self.directory / INDEX
        if not index.is_file():
            if any((self.directory / name).is_file() for name in (SINGLE, SINGLE + HEADER_SUFFIX)):
                return [SINGLE]
            found = sorted(p.name for p in self.directory.glob("*"))
            raise CheckpointError(
                f"{self.directory}: no weights; looked for {INDEX} and {SINGLE}, found "
                f"{', '.join(found[:12]) or 'nothing'}; save other formats as safetensors first"
            )
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError):
            raise CheckpointError(f"{index}: expected JSON with a weight_map of names") from None
        for name in names:
            if not isinstance(name, str) or Path(name).name != name:
                raise CheckpointError(f"{index}: {name!r} is not the name of a file next to it")
        return names


def _read_header(path: Path) -> bytes:
    """Return the header of a weight file, or the copy of it that is kept without the weights."""
    alone = path.with_name(path.name + HEADER_SUFFIX)
    if not path.is_file() and alone.is_file():
        return alone.read_bytes()
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file, but {INDEX} names it; fetch it again")
    with path.open("rb") as file:
        prefix = file.read(8)
        length, size = int.from_bytes(prefix, "little"), path.stat().st_size
        if len(prefix) < 8 or length > min(MAX_HEADER_BYTES, size - 8):
            raise CheckpointError(
                f"{path}: not a safetensors file, or cut off ({size} bytes); fetch it again"
            )
        return prefix + file.read(length)


def _parse_header(path: Path, header: bytes) -> list[StoredTensor]:
    """Return all tensors that a header lists, or raise `CheckpointError`."""
    found = []
    try:
        content: dict[str, Any] = json.loads(header[8:])
        content.pop("__metadata__", None)
        for name, entry in content.items():
            if entry["dtype"] not in DTYPES:
                raise CheckpointError(
                    f"{path}: tensor {name} has type {entry['dtype']}; expected one of "
                    f"{', '.join(DTYPES)} (quantised weights must be expanded first)"
                )
            begin, end = entry["data_offsets"]
            dtype, shape, size = DTYPES[entry["dtype"]], tuple(entry["shape"]), end - begin
            if begin < 0 or size != dtype.itemsize * torch.Size(shape).numel():
                raise CheckpointError(f"{path}: tensor {name}: offsets and shape {shape} disagree")
            found.append(StoredTensor(name, path.name, dtype, shape, len(header) + begin, size))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{path}: its header is not that of a safetensors file") from None
    last = max((tensor.begin + tensor.num_bytes for tensor in found), default=0)
    if path.is_file() and last > (size := path.stat().st_size):
        raise CheckpointError(f"{path}: cut off at {size} of {last} bytes; fetch it again")
    return found


def check_target(source: HFSource, target: Path) -> None:
    """Refuse a target that is a file, holds something else, or lies inside the source."""
    if source.directory.resolve() in target.resolve().parents:
        raise CheckpointError(
            f"{target} lies inside the source {source.directory}; write elsewhere"
        )
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"{target} is a file; name a directory for the model")
    if any(target.glob("*")) and not (target / "config.json").is_file():
        raise CheckpointError(
            f"{target} is not empty and holds no model (no config.json); name another directory"
        )


def write_like(source: HFSource, target: Path, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Write weights into a directory like the source's, replacing the target; on one rank.

    `weights` yields (published name, whole tensor), every tensor of the source once. Raises
    `CheckpointError` if one did not come or does not fit.
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
            files[stored.file].seek(stored.begin)
            files[stored.file].write(tensor_bytes(stored, tensor))
        if awaited:
            raise CheckpointError(f"{target}: no values came for {', '.join(list(awaited)[:12])}")
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
    replace_directory(partial, target)


def tensor_bytes(stored: StoredTensor, tensor: torch.Tensor) -> memoryview:
    """Return a tensor as it is stored; raise `CheckpointError` if its shape is another."""
    if tuple(tensor.shape) != stored.shape:
        raise CheckpointError(
            f"{stored.name}: {list(tensor.shape)} came, {stored.file} has {list(stored.shape)}"
        )
    values = tensor.detach().to("cpu", stored.dtype).contiguous()
    return memoryview(values.flatten().view(torch.uint8).numpy())


def replace_directory(new: Path, target: Path) -> None:
    """Rename a finished directory to the target's name, then remove an older one of that name."""
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    new.rename(target)
    shutil.rmtree(old, ignore_errors=True)
