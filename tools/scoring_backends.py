"""The three backends of score_logprobs.py.

Each takes the tool's options and lines, and returns for each line the logprobs of its response, in
nats, on the first rank at least.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_sr1.checkpoint.folders import ModelSource
from megatron_sr1.checkpoint.hf import check_tensors, save_hf
from megatron_sr1.checkpoint.hf_files import HFSource
from megatron_sr1.checkpoint.loading import load_model
from megatron_sr1.checkpoint.untrusted import stored_dtype
from megatron_sr1.config.rollout import RolloutConfig
from megatron_sr1.config.run import ModelConfig, ParallelConfig
from megatron_sr1.data.guards import located
from megatron_sr1.data.images import decode_image
from megatron_sr1.data.packing import pack_samples
from megatron_sr1.data.processor import Processor
from megatron_sr1.errors import DataError
from megatron_sr1.model.hf_config import read_hf_config
from megatron_sr1.model.qwen25_vl import build_model
from megatron_sr1.model.row_split import sequence_multiple
from megatron_sr1.records import TrainSample
from megatron_sr1.runtime import cpu
from megatron_sr1.runtime.groups import Groups, make_groups

Lines = Sequence[Any]
Scores = list[list[float]]
SIZES = ("tensor", "pipeline", "context")


def megatron(
    arguments: argparse.Namespace, source: ModelSource, device: torch.device, lines: Lines
) -> Scores:
    """Score with the Megatron model under the chosen layout."""
    from megatron_sr1.trainer.actor import Actor
    from megatron_sr1.trainer.step import sample_logprobs

    sizes = {kind: getattr(arguments, f"{kind}_parallel") for kind in SIZES}
    groups = make_groups(ParallelConfig(**sizes), device)
    model = ModelConfig(dtype=arguments.dtype, spec=arguments.spec)
    chunks, hf_config = loaded(source, groups, model)
    processor = make_processor(arguments, source)
    images = [open_images(line) for line in lines]
    samples = [
        train_sample(number, line, pictures, processor)
        for number, (line, pictures) in enumerate(zip(lines, images, strict=True))
    ]
    multiple = sequence_multiple(groups.context.size)
    batches = pack_samples(
        samples,
        arguments.pack_tokens,
        (lambda n: processor.vision(images[n])) if groups.is_first_stage else None,
        image_pad_id=processor.image_pad_id,
        merge_size=processor.merge_size,
        sequence_multiple=multiple,
        pad_multiple=multiple,
    )
    actor = Actor(chunks, chunks, None, None, hf_config, source, groups, multiple)
    found = sample_logprobs(actor, samples, batches, 1.0) if batches else []
    return [row[len(line.prompt) :].tolist() for row, line in zip(found, lines, strict=True)]


@torch.no_grad()
def transformers(
    arguments: argparse.Namespace, source: ModelSource, device: torch.device, lines: Lines
) -> Scores:
    """Score with transformers' own model, one line at a time."""
    cpu.patch_torchvision()
    from transformers import Qwen2_5_VLForConditionalGeneration

    processor = make_processor(arguments, source)
    with huggingface_directory(source, device) as directory:
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            directory, dtype=getattr(torch, arguments.dtype)
        )
    model = model.to(device).eval()
    found = []
    for line in lines:
        ids = torch.tensor([[*line.prompt, *line.response]], device=device)
        inputs: dict[str, Any] = {}
        images = open_images(line)
        if vision := processor.vision(images):
            inputs = {
                "pixel_values": vision.pixel_values.to(device),
                "image_grid_thw": vision.image_grid_thw.to(device),
                "mm_token_type_ids": (ids == processor.image_pad_id).int(),
            }
        logits = model(input_ids=ids, use_cache=False, **inputs).logits[0, len(line.prompt) - 1 :]
        logprobs = logits[:-1].float().log_softmax(-1)
        targets = ids[0, len(line.prompt) :, None]
        found.append(logprobs.gather(1, targets)[:, 0].tolist())
    return found


def vllm(
    arguments: argparse.Namespace, source: ModelSource, device: torch.device, lines: Lines
) -> Scores:
    """Score with the rollout engine, by prefill."""
    from megatron_sr1.rollout.engine import Engine

    processor = make_processor(arguments, source)
    longest = max((len(line.prompt) + len(line.response) for line in lines), default=0)
    with huggingface_directory(source, device) as directory:
        engine = Engine(
            directory,
            RolloutConfig(
                tensor_parallel=arguments.tensor_parallel,
                max_model_len=longest + 16,
                max_num_seqs=4,
                sleep_level=0,
            ),
            processor,
            device_kind=device.type,
            dtype=arguments.dtype,
        )
    found = []
    for line in lines:
        images = open_images(line)
        train_sample(0, line, images, processor)  # the same checks as the other backends
        vision = processor.vision(images)
        found.append(engine.logprobs(line.prompt, line.response, vision) if line.response else [])
    return found


def loaded(source: ModelSource, groups: Groups, model: ModelConfig) -> tuple[list[Any], Any]:
    """Build a model, load the source's weights, and return it with its configuration."""
    hf_config = read_hf_config(source.hf_files)
    with cpu.megatron_mode():
        chunks = build_model(hf_config, groups, model, ParallelConfig())
        load_model(chunks, source, hf_config, groups, verify=True)
    return chunks, hf_config


@contextlib.contextmanager
def huggingface_directory(source: ModelSource, device: torch.device) -> Iterator[Path]:
    """Yield a Hugging Face directory of the model: its own, or a temporary export."""
    if source.kind == "huggingface":
        check_tensors(HFSource(source.weights), read_hf_config(source.hf_files))
        yield source.weights
        return
    groups = make_groups(ParallelConfig(), device)
    names = [tempfile.mkdtemp(prefix="score_logprobs_") if groups.world.rank == 0 else None]
    dist.broadcast_object_list(names)
    directory = Path(str(names[0]))
    try:
        stored = ModelConfig(dtype=str(stored_dtype(source.weights)).removeprefix("torch."))
        chunks, hf_config = loaded(source, groups, stored)
        save_hf(chunks, hf_config, groups, source.hf_files, directory / "hf")
        del chunks
        yield directory / "hf"
        dist.barrier()
    finally:
        if groups.world.rank == 0:
            shutil.rmtree(directory, ignore_errors=True)


def make_processor(arguments: argparse.Namespace, source: ModelSource) -> Processor:
    """Load tokenizer and image processor; pixel limits are the model's unless options set them."""
    return Processor(source.hf_files, arguments.min_pixels, arguments.max_pixels)


def train_sample(
    number: int, line: Any, images: Sequence[Any], processor: Processor
) -> TrainSample:
    """Convert a line to a sample; raise a DataError if its image-pad runs do not fit its images."""
    with located(line.where):
        grids = tuple(processor.grid(image) for image in images)
        expanded = processor.expand(collapse(line.prompt, processor.image_pad_id), grids)
    if expanded != line.prompt:
        raise DataError(
            f"{line.where}: the images make a prompt of {len(expanded)} tokens, it has "
            f"{len(line.prompt)}; expand each image to its own number of image-pad ids "
            f"({processor.image_pad_id}), under the same --min-pixels and --max-pixels"
        )
    token_ids = np.array((*line.prompt, *line.response), np.int64)
    mask = np.arange(len(token_ids)) >= len(line.prompt)
    return TrainSample(number, len(images), token_ids, mask, grids)


def collapse(token_ids: Sequence[int], image_pad_id: int) -> tuple[int, ...]:
    """Return the prompt with one image-pad id per image."""
    runs = itertools.groupby(token_ids)
    return tuple(t for token, run in runs for t in ([token] if token == image_pad_id else run))


def open_images(line: Any) -> list[Any]:
    """Decode the images of a line under the limits for all data."""
    images = []
    for path in line.images:
        with located(f"{line.where}: {path}"):
            images.append(decode_image(path.read_bytes()))
    return images


BACKENDS: dict[str, Callable[..., Scores]] = {
    "megatron": megatron,
    "transformers": transformers,
    "vllm": vllm,
}
