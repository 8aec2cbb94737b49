"""Images encoded by turns: each of a row's images on one of the ranks, features on all.

In: the images of a row, the same on all ranks, and the tower. Out: the features of all images on
each rank. Images are shared out whole, so that windows and full attention stay within a rank, and
by patches, which is what the tower's time goes with. On the way back a feature's gradient is summed
over the ranks and goes to the one that made it: context-parallel ranks each had a share of the row;
tensor-parallel ranks had equal copies, so there the sum is their number times too large, which the
mean of the tower's gradients over them makes up for (`make_tower`).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_sr1.model.hf_config import HFConfig
from megatron_sr1.model.transformer_config import vision_transformer_config
from megatron_sr1.model.vision import VisionModel, check_patches
from megatron_sr1.records import VisionInputs
from megatron_sr1.runtime.groups import Group, Groups, share_out


def make_tower(
    config: TransformerConfig, hf_config: HFConfig, groups: Groups, kernels: str
) -> VisionModel:
    """The tower, over the tensor-parallel ranks or whole on each of them.

    Args:
        config: of the language model.
        hf_config: shape of the model.
        groups: the layout.
        kernels: local | transformer_engine.
    """
    vision, collection = hf_config.vision, groups.collection
    tower_config = vision_transformer_config(config, vision, groups.tower.size)
    if groups.tower.size == groups.tensor.size:
        return VisionModel(tower_config, vision, kernels, collection)
    collection = copy.copy(collection)
    collection.tp = groups.tower.process_group
    tower = VisionModel(tower_config, vision, kernels, collection)
    for parameter in tower.parameters():
        # Each rank adds the gradient of its own images, and encode_by_turns sums what equal
        # copies of the language model's rows send back: so over the ranks it is the mean.
        parameter.average_gradients_across_tp_domain = True  # type: ignore[attr-defined]
        parameter.tensor_model_parallel = False  # type: ignore[attr-defined]
    return tower


def assign_images(sizes: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Which images each rank encodes: the largest first, each to the rank with the least to do.

    Args:
        sizes: of the images, patches.
        num_ranks: ranks to share them.

    Returns:
        for each rank numbers of images, ascending; a rank may have none.
    """
    return [sorted(share) for share in share_out(sizes, num_ranks)]


def encode_by_turns(tower: VisionModel, inputs: VisionInputs, group: Group) -> torch.Tensor:
    """Features of all images, each encoded on one rank; collective over the group.

    Args:
        tower: the same on all ranks.
        inputs: all images, equal on all ranks.
        group: ranks to share them.

    Returns:
        [merged tokens, width], in the images' order.

    Raises:
        DataError: grids and pixels do not fit.
    """
    check_patches(inputs)
    merged = tower.vision.spatial_merge_size**2
    sizes = [t * h * w for t, h, w in inputs.image_grid_thw.tolist()]
    shares = assign_images(sizes, group.size)
    counts = [sum(sizes[i] for i in share) // merged for share in shares]
    pixels, own = inputs.pixel_values.split(sizes), shares[group.rank]
    parts = []
    if own:
        mine = VisionInputs(torch.cat([pixels[i] for i in own]), inputs.image_grid_thw[own])
        parts.append(tower(mine))
    # Ranks give equally many rows. The filling asks for a gradient, so that every rank takes part
    # in the sum on the way back, one without images or with a frozen tower too.
    filling = torch.zeros(
        max(counts) - counts[group.rank],
        tower.vision.out_hidden_size,
        dtype=tower.config.params_dtype,
        device=inputs.pixel_values.device,
        requires_grad=torch.is_grad_enabled(),
    )
    padded = torch.cat([*parts, filling])
    whole = gather_from_sequence_parallel_region(padded, group=group.process_group)
    places: dict[int, torch.Tensor] = {}
    for rank, share in enumerate(shares):
        first = rank * max(counts)
        for number in share:
            places[number] = torch.arange(first, first + sizes[number] // merged)
            first += len(places[number])
    order = torch.cat([places[number] for number in range(len(sizes))])
    return whole.index_select(0, order.to(whole.device))
