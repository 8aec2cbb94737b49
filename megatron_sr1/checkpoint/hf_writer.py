"""A directory like a published one, with other weights in it: whole or not there at all.

In: a source directory and a stream of whole tensors. Out: the same files with the stream's values;
the weight files carry the source's headers, so equal values make equal files. Nothing under the
target's name changes before everything is on the disk.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

import torch

from megatron_sr1.checkpoint.source import HFSource, StoredTensor
from megatron_sr1.errors import CheckpointError


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
