"""Check a checkpoint's pickles before anything in them is unpickled.

Torch's distributed checkpoint format pickles its `.metadata`, and Megatron the values that are not
tensors. A pickle that names anything but the plain records that belong there is refused.
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
from megatron_sr1.runtime.groups import reason

_CHECKPOINT = "torch.distributed.checkpoint"
ALLOWED = {
    f"{_CHECKPOINT}.metadata": "Metadata BytesStorageMetadata ChunkStorageMetadata MetadataIndex "
    "TensorStorageMetadata TensorProperties StorageMeta _MEM_FORMAT_ENCODING",
    f"{_CHECKPOINT}.planner": "SavePlan TensorWriteData WriteItem WriteItemType",
    f"{_CHECKPOINT}.filesystem": "_StorageInfo",
    "torch": "Size",
    "torch.serialization": "_get_layout",
    "collections": "OrderedDict",
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
    """Unpickles the records of a checkpoint's metadata only."""

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if name not in ALLOWED.get(module, "").split() and not is_dtype:
            raise CheckpointError(f"it names {module}.{name}, which no checkpoint needs")
        return super().find_class(module, name)


def _unpickle(data: bytes) -> Any:
    """Read a pickle of records after checking its operations.

    Unpickling, here and by torch afterwards, allocates memory for any length and any object number
    that a few bytes ask for. genops refuses lengths beyond the data; this also refuses numbers.
    """
    for operation, argument, _ in pickletools.genops(data):
        if operation.name in ("PUT", "BINPUT", "LONG_BINPUT") and (argument or 0) > len(data):
            raise CheckpointError(f"it numbers an object {argument}, but has {len(data)} bytes")
    return _Reader(io.BytesIO(data)).load()


def stored_dtype(folder: Path) -> torch.dtype:
    """Return the type of the model's tensors in a checkpoint; float32 if they have several."""
    kinds = check_folder(folder).state_dict_metadata
    names = [n for n in kinds if n != COMMON_OBJECT and not n.startswith("optimizer.")]
    types = {kinds[name].properties.dtype for name in names}
    return types.pop() if len(types) == 1 else torch.float32


def check_folder(folder: Path) -> Any:
    """Return torch's `Metadata` of a checkpoint; refuse one that would run code when it is read."""
    path = folder / ".metadata"
    try:
        metadata = _unpickle(path.read_bytes())
        kinds = metadata.state_dict_metadata
        for index, info in metadata.storage_data.items():
            # A path that leaves the directory would be read from elsewhere.
            if Path(info.relative_path).name != info.relative_path:
                raise CheckpointError(f"it points to {info.relative_path!r}, outside its directory")
            filters = getattr(info, "transform_descriptors", None)
            if filters:  # they would change bytes
                raise CheckpointError(f"it filters {info.relative_path} with {filters}")
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


def _check_pickle(name: str, file: Path | io.BytesIO) -> None:
    """Refuse what cannot be loaded as plain values."""
    try:
        torch.load(file, map_location="cpu", weights_only=True)
    except (*DAMAGE, OSError) as error:
        raise CheckpointError(f"{name} is refused or damaged: {reason(error)}") from None
