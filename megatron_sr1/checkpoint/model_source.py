"""What a model directory is, published weights or a checkpoint of ours, and a mark of its weights.

In: a path that a user gives. Out: where weights, configuration and tokenizer are, loaded chunks,
and a fingerprint that changes when the weights do.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sr1.checkpoint.files import DIGEST
from megatron_sr1.checkpoint.folders import LATEST, STATE, latest_step
from megatron_sr1.checkpoint.hf import load_hf
from megatron_sr1.checkpoint.mapping import OUTPUT
from megatron_sr1.checkpoint.sharded import load_tensors
from megatron_sr1.checkpoint.source import INDEX, SINGLE
from megatron_sr1.checkpoint.state import read_state
from megatron_sr1.checkpoint.untrusted import check_folder
from megatron_sr1.checkpoint.verify import verify_folder
from megatron_sr1.errors import CheckpointError
from megatron_sr1.model.hf_config import HFConfig, read_hf_config
from megatron_sr1.runtime.groups import Groups

HF_FILES = "hf_files"
FINGERPRINTED = ("config.json", INDEX, "*.safetensors", ".metadata", "*.distcp")
NUM_BLOCKS, BLOCK_BYTES = 64, 4096


@dataclass(frozen=True)
class ModelSource:
    """Where a model's weights and the files beside them are.

    Attributes:
        kind: huggingface | megatron.
        weights: folder of the weights.
        hf_files: Hugging Face directory with configuration and tokenizer; with weights only where
            `kind` is huggingface.
    """

    kind: str
    weights: Path
    hf_files: Path


def resolve_model(directory: str | Path) -> ModelSource:
    """Tell what kind of model directory this is.

    Args:
        directory: a Hugging Face directory, a folder of checkpoints with `latest` in it, or one
            `step_N` folder of those.

    Raises:
        CheckpointError: it is none of these.
    """
    path = Path(directory)
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder; give a Hugging Face or a checkpoint folder")
    has_weights = (path / INDEX).is_file() or (path / SINGLE).is_file()
    if (path / "config.json").is_file() and has_weights:
        return ModelSource("huggingface", path, path)
    step = latest_step(path)
    folder = path if step is None else path / f"step_{step}"
    if (folder / ".metadata").is_file():
        if not (folder / HF_FILES / "config.json").is_file():
            raise CheckpointError(
                f"{folder}: a checkpoint without {HF_FILES}/config.json, so its model's shape is "
                "not known; it can resume its run, but not be a model"
            )
        return ModelSource("megatron", folder, folder / HF_FILES)
    raise CheckpointError(
        f"{path} is no model: looked for config.json with {INDEX} or {SINGLE} (Hugging Face), and "
        f"for {LATEST}, step_N folders or .metadata (Megatron); found "
        f"{', '.join(sorted(p.name for p in path.iterdir())[:12]) or 'nothing'}"
    )


def load_model(
    chunks: Sequence[Any],
    source: ModelSource,
    hf_config: HFConfig,
    groups: Groups,
    verify: bool = True,
) -> None:
    """Fill the chunks from a model directory of either kind; collective over all ranks.

    Args:
        chunks: the model, one chunk a virtual stage.
        source: the directory.
        hf_config: shape of the model.
        groups: the layout.
        verify: compare the digests of a Megatron checkpoint, not only the sizes.

    Raises:
        CheckpointError: the weights are not those of the model, or damaged.
    """
    if source.kind == "huggingface":
        load_hf(chunks, source.weights, hf_config, groups)
    else:
        verify_source(source, groups, verify)
        load_tensors(source.weights, chunks, None)


def verify_source(source: ModelSource, groups: Groups, digests: bool) -> None:
    """Compare a Megatron checkpoint with its manifest; collective over all ranks.

    Raises:
        CheckpointError: on all ranks: a file is not as it was saved, or the checkpoint has an
            output layer that its configuration would have replaced by the embedding.
    """
    has_state = (source.weights / STATE).is_file()
    saved_with = read_state(source.weights)["format"] if has_state else 0
    verify_folder(source.weights, groups, digests, saved_with)
    config = read_hf_config(source.hf_files)
    if config.tie_word_embeddings and OUTPUT in check_folder(source.weights).state_dict_metadata:
        raise CheckpointError(
            f"{source.weights} holds an output layer of its own, but {source.hf_files}/config.json "
            "has tie_word_embeddings=true; set it to false in every place"
        )


def fingerprint(source: ModelSource) -> str:
    """A mark of a model directory's weights, cheap at any size.

    It covers the names and sizes of the weight files and blocks of each, evenly spread from the
    first bytes to the last: all of a file up to 256 KiB. Training moves all weights, so that
    another model has another mark; a single value changed by hand may go unseen.

    Returns:
        32 hexadecimal digits.
    """
    mark = hashlib.new(DIGEST)
    for path in sorted({p for pattern in FINGERPRINTED for p in source.weights.glob(pattern)}):
        size = path.stat().st_size
        mark.update(f"{path.name} {size}\n".encode())
        last = max(size - BLOCK_BYTES, 0)
        with path.open("rb") as file:
            for number in range(NUM_BLOCKS):
                file.seek(last * number // (NUM_BLOCKS - 1))
                mark.update(file.read(BLOCK_BYTES))
    return mark.hexdigest()[:32]
