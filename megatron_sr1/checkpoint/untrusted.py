"""A checkpoint's files are looked at before anything in them is unpickled.

Torch's distributed checkpoint format pickles its `.metadata`, and Megatron's beside it a
`common.pt`. In: a checkpoint folder. Out: nothing, or an error if the pickles name anything but
the plain records that belong there. Objects pickled inside the data files are refused as well: a
checkpoint of ours has tensors only.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from megatron_sr1.errors import CheckpointError

_RECORDS = "torch.distributed.checkpoint.metadata"
_PLANNER = "torch.distributed.checkpoint.planner"
ALLOWED = {
    (_RECORDS, "Metadata"),
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


class _Reader(pickle.Unpickler):
    """Unpickles the records of a checkpoint's metadata and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if (module, name) not in ALLOWED and not is_dtype:
            raise CheckpointError(f"it names {module}.{name}, which no checkpoint of ours does")
        return super().find_class(module, name)


def stored_dtype(folder: Path) -> torch.dtype:
    """Type of the model's tensors in a checkpoint; float32 holds a mixture without loss."""
    tensors = check_folder(folder).state_dict_metadata.items()
    types = {t.properties.dtype for name, t in tensors if not name.startswith("optimizer.")}
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
        with path.open("rb") as file:
            metadata = _Reader(file).load()
        # A path that leaves the folder would be read from somewhere else.
        for info in metadata.storage_data.values():
            if Path(info.relative_path).name != info.relative_path:
                raise CheckpointError(f"it points to {info.relative_path!r}, outside its folder")
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; the checkpoint is not complete") from None
    except CheckpointError as error:
        raise CheckpointError(f"{path} is refused: {error}") from None
    except (pickle.UnpicklingError, EOFError, AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: damaged: {error}") from None
    common = folder / "common.pt"
    try:
        torch.load(common, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{common} is refused or damaged: {reason}") from None
    return metadata
