"""A checkpoint's files are looked at before anything in them is unpickled.

Torch's distributed checkpoint format pickles its `.metadata`, and Megatron beside it the values
that are no tensors. In: a checkpoint folder. Out: its metadata, or an error if the pickles name
anything but the plain records that belong there.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import struct
from pathlib import Path
from typing import Any

import torch

from megatron_sr1.errors import CheckpointError

_RECORDS = "torch.distributed.checkpoint.metadata"
_PLANNER = "torch.distributed.checkpoint.planner"
ALLOWED = {
    (_RECORDS, "Metadata"),
    (_RECORDS, "BytesStorageMetadata"),
    (_RECORDS, "ChunkStorageMetadata"),
    (_RECORDS, "TensorStorageMetadata"),
    (_RECORDS, "TensorProperties"),
    (_RECORDS, "MetadataIndex"),
    (_RECORDS, "StorageMeta"),
    (_RECORDS, "_MEM_FORMAT_ENCODING"),
    (_PLANNER, "SavePlan"),
    (_PLANNER, "TensorWriteData"),
    (_PLANNER, "WriteItem"),
    (_PLANNER, "WriteItemType"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
}
# Newer releases of Megatron-Core keep the values of common.pt in this object instead.
COMMON_OBJECT = "common_state/shard_0_1"
DAMAGE = (
    *(pickle.UnpicklingError, EOFError, AttributeError, TypeError, ValueError, IndexError),
    # A changed byte may ask for any length, any key, any depth and any module.
    *(MemoryError, OverflowError, KeyError, RuntimeError, ImportError, AssertionError),
    struct.error,  # torch's own reader, at the end of a pickle that was cut
)


class _Reader(pickle.Unpickler):
    """Unpickles the records of a checkpoint's metadata and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if (module, name) not in ALLOWED and not is_dtype:
            raise CheckpointError(f"it names {module}.{name}, which no checkpoint of ours does")
        return super().find_class(module, name)


def _unpickle(data: bytes) -> Any:
    """Read a pickle of records, after a look at its operations.

    Unpickling, here and by torch afterwards, makes room for any length and any number that a few
    bytes ask for. genops refuses lengths beyond the data, this a number beyond them.
    """
    for operation, argument, _ in pickletools.genops(data):
        if operation.name in ("PUT", "BINPUT", "LONG_BINPUT") and (argument or 0) > len(data):
            raise CheckpointError(f"it numbers an object {argument}, but has {len(data)} bytes")
    return _Reader(io.BytesIO(data)).load()


def stored_dtype(folder: Path) -> torch.dtype:
    """Type of the model's tensors in a checkpoint; float32 holds a mixture without loss."""
    kinds = dict(check_folder(folder).state_dict_metadata)
    kinds.pop(COMMON_OBJECT, None)
    types = {t.properties.dtype for name, t in kinds.items() if not name.startswith("optimizer.")}
    return types.pop() if len(types) == 1 else torch.float32


def check_folder(folder: Path) -> Any:
    """Refuse a distributed checkpoint that would run code when it is read.

    Returns:
        torch's `Metadata` of the checkpoint.

    Raises:
        CheckpointError: naming the file and what it asks for.
    """
    path = folder / ".metadata"
    try:
        metadata = _unpickle(path.read_bytes())
        kinds = metadata.state_dict_metadata
        for index, info in metadata.storage_data.items():
            _check_place(info)
            # Tensors are read with weights_only=True by torch itself, other objects are not.
            if type(kinds.get(index.fqn)).__name__ != "TensorStorageMetadata":
                if index.fqn != COMMON_OBJECT:
                    raise CheckpointError(f"it holds {index.fqn}, an object and not a tensor")
                with (folder / info.relative_path).open("rb") as file:
                    file.seek(info.offset)
                    _check_pickle(f"{path}: {COMMON_OBJECT}", io.BytesIO(file.read(info.length)))
    except FileNotFoundError as error:
        raise CheckpointError(f"{error.filename}: no such file; the checkpoint is cut") from None
    except CheckpointError as error:
        raise CheckpointError(f"{path} is refused: {error}") from None
    except DAMAGE as error:
        raise CheckpointError(f"{path}: damaged: {error}") from None
    if COMMON_OBJECT not in kinds:
        _check_pickle(str(folder / "common.pt"), folder / "common.pt")
    return metadata


def _check_place(info: Any) -> None:
    """A path that leaves the folder would be read from elsewhere, a filter would change bytes."""
    if Path(info.relative_path).name != info.relative_path:
        raise CheckpointError(f"it points to {info.relative_path!r}, outside its folder")
    if getattr(info, "transform_descriptors", None):
        raise CheckpointError(f"it filters {info.relative_path} with {info.transform_descriptors}")


def _check_pickle(name: str, file: Path | io.BytesIO) -> None:
    """Load something as plain values, or refuse it."""
    try:
        torch.load(file, map_location="cpu", weights_only=True)
    except (*DAMAGE, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{name} is refused or damaged: {reason}") from None
