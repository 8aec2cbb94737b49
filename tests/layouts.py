"""Layouts in short form, batches, and gradients: for the table of layouts and for tests."""

from __future__ import annotations

import gc
import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image

from megatron_sr1.data.packing import pack_samples
from megatron_sr1.data.processor import Processor
from megatron_sr1.model.hf_config import HFConfig
from megatron_sr1.model.row_split import sequence_multiple
from megatron_sr1.records import PackedBatch, TrainSample
from megatron_sr1.runtime.groups import Groups

START, VISION_START, VISION_END = 1, 3, 4  # ids of the digits model's vocabulary
NUM_OPENING = 3
"""Text tokens of a sample that are never in its loss."""


def layout_settings(layout: str, num_layers: int = 4) -> list[str]:
    """Return the settings that a layout in short form stands for.

    `2x1x2si` is 2 tensor-parallel ranks, 1 pipeline stage, 2 context-parallel ranks and letters: s
    sequence parallelism, i the tower by images, v two virtual stages a rank, u one layer a stage
    and the rest on the last, w an optimizer that is not distributed, b bfloat16 weights. Data
    parallelism is what remains of the ranks.

    Args:
        layout: the short form.
        num_layers: layers of the language model, at least as many as stages.
    """
    matched = re.fullmatch(r"(\d)x(\d)x(\d)([sivuwb]*)", layout)
    assert matched is not None, layout
    tensor, pipeline, context = map(int, matched.groups()[:3])
    letters = matched[4]
    virtual = 2 if "v" in letters else 1
    num_stages = pipeline * virtual
    uneven = [1] * (num_stages - 1) + [num_layers - num_stages + 1]
    parallel = {
        "tensor": tensor,
        "pipeline": pipeline,
        "context": context,
        "virtual": virtual,
        "stage_layers": uneven if "u" in letters else [],
        "sequence": "s" in letters,
        "vision": "images" if "i" in letters else "tensor",
        "distributed_optimizer": "w" not in letters,
    }
    dtype = "bfloat16" if "b" in letters else "float32"
    settings = [f"parallel.{key}={json.dumps(value)}" for key, value in parallel.items()]
    return [f"model.dtype={dtype}", *settings]


def random_samples(
    processor: Processor, images: Sequence[Sequence[tuple[int, int]]], num_text: Sequence[int]
) -> tuple[list[TrainSample], list[list[Image.Image]]]:
    """Draw samples: images of noise, then random text, of which most tokens are in the loss.

    Args:
        processor: of the digits model.
        images: width and height of each image of each sample, pixels.
        num_text: text tokens of each sample, more than `NUM_OPENING`.

    Returns:
        samples with random advantages and logprobs, their images.
    """
    rng = np.random.default_rng(7)
    samples, pictures = [], []
    for index, (sizes, num_tokens) in enumerate(zip(images, num_text, strict=True)):
        held = [Image.fromarray(rng.integers(0, 255, (h, w, 3), dtype=np.uint8)) for w, h in sizes]
        grids = tuple(processor.grid(image) for image in held)
        tokens = [START]
        for t, h, w in grids:
            num_pads = t * h * w // processor.merge_size**2
            tokens += [VISION_START, *([processor.image_pad_id] * num_pads), VISION_END]
        num_prompt = len(tokens) + NUM_OPENING
        tokens += rng.integers(10, 300, size=num_tokens).tolist()
        length = len(tokens)
        numbers = rng.standard_normal((4, length)).astype(np.float32)
        samples.append(
            TrainSample(
                index=index,
                num_images=len(held),
                token_ids=np.array(tokens),
                loss_mask=(np.arange(length) >= num_prompt) & (rng.random(length) < 0.8),
                image_grid_thw=grids,
                advantages=numbers[0],
                old_logprobs=-6 + 0.2 * numbers[1],
                engine_logprobs=-6 + 0.2 * numbers[2],
                reference_logprobs=-6 + 0.2 * numbers[3],
            )
        )
        pictures.append(held)
    return samples, pictures


def pack_rows(
    samples: Sequence[TrainSample],
    pictures: Sequence[list[Image.Image]],
    processor: Processor,
    groups: Groups,
    row_budget: int,
    share_prompts: bool = False,
) -> list[PackedBatch]:
    """Pack this data-parallel rank's part of the samples; 0 or 1 gives each a row of its own."""
    multiple = sequence_multiple(groups.context.size)
    return pack_samples(
        samples[groups.data.rank :: groups.data.size],
        row_budget,
        lambda index: processor.vision(pictures[index]),
        image_pad_id=processor.image_pad_id,
        merge_size=processor.merge_size,
        pad_multiple=groups.tensor.size * multiple,
        sequence_multiple=multiple,
        share_prompts=share_prompts,
    )


def exported(chunks: Sequence[Any], hf_config: HFConfig, groups: Groups) -> dict[str, torch.Tensor]:
    """Copies of the whole weights under their published names; collective."""
    from megatron_sr1.checkpoint.hf import export_weights

    weights = export_weights(chunks, hf_config, groups)
    return {name: weight.clone() for name, weight in weights}


def destroy_groups() -> None:
    """Undo `make_groups`, so that other groups can be made; collective over all ranks.

    Megatron itself only drops its references: the groups' threads would live on, busy waiting, as
    do those of a model that still exists. Groups created by others, such as an engine in this
    process, stay.
    """
    from megatron.core import parallel_state

    dist.barrier()
    for group in parallel_state._global_process_group_list or []:
        if group is not None:  # None is the default group, which stays
            dist.destroy_process_group(group)
    parallel_state.destroy_model_parallel()
    gc.collect()  # models and optimizers hold groups in reference cycles
