"""What the layouts' table and their tests share: a prompt's images, a model's gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from megatron_sr1.data.processor import Processor
from megatron_sr1.model.hf_config import HFConfig
from megatron_sr1.runtime.groups import Groups

START, VISION_START, VISION_END = 1, 3, 4  # ids of the digits model's vocabulary


def random_images(
    rng: np.random.Generator, sizes: Sequence[tuple[int, int]], processor: Processor
) -> tuple[list[Image.Image], tuple[tuple[int, int, int], ...], list[int]]:
    """Images of noise and the beginning of a sequence that holds them.

    Args:
        rng: draws the pixels.
        sizes: width and height of each, pixels.
        processor: of the digits model.

    Returns:
        images, their grids (t, h, w) in patches, and token ids.
    """
    images = [Image.fromarray(rng.integers(0, 255, (h, w, 3), dtype=np.uint8)) for w, h in sizes]
    grids = tuple(processor.grid(image) for image in images)
    tokens = [START]
    for t, h, w in grids:
        num_pads = t * h * w // processor.merge_size**2
        tokens += [VISION_START, *([processor.image_pad_id] * num_pads), VISION_END]
    return images, grids, tokens


def published_gradients(
    chunks: Sequence[Any], hf_config: HFConfig, groups: Groups
) -> dict[str, torch.Tensor]:
    """Gradients under their published names, gathered as weights are exported; weights are kept.

    Replicated parameters come from this rank, so each rank compares its own copy.
    """
    parameters = [p for chunk in chunks for p in chunk.parameters()]
    kept = [p.data for p in parameters]
    for parameter in parameters:
        gradient = getattr(parameter, "main_grad", parameter.grad)
        parameter.data = torch.zeros_like(parameter) if gradient is None else gradient.clone()
    gradients = exported(chunks, hf_config, groups)
    for parameter, data in zip(parameters, kept, strict=True):
        parameter.data = data
    return gradients


def exported(chunks: Sequence[Any], hf_config: HFConfig, groups: Groups) -> dict[str, torch.Tensor]:
    """Copies of the whole weights under their published names; collective."""
    from megatron_sr1.checkpoint.hf import export_weights

    weights = export_weights(chunks, hf_config, groups)
    return {name: weight.clone() for name, weight in weights}
