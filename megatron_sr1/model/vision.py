"""The vision tower on Megatron layers, from patches to one feature per merged token.

Linear layers are split over the tensor-parallel ranks; patch embedding and norms are replicated,
each with the whole gradient, as every rank sees all patches (the tower never runs under sequence
parallelism). Source of the computation: transformers, models/qwen2_5_vl/modeling_qwen2_5_vl.py.

Patches come in merge order: those of a merged token are adjacent. For windowed attention merged
tokens are sorted by window; images, and frames in them, remain contiguous, so the same row serves
the blocks that attend over the whole image. Whole images may be divided among ranks, balanced by
patches (`encode_by_turns`).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_sr1.errors import DataError
from megatron_sr1.model.attention import PackedRow, pack_row
from megatron_sr1.model.hf_config import HFConfig, VisionConfig
from megatron_sr1.model.layers import Kernels, kernels, vision_angles
from megatron_sr1.model.row_split import split_row
from megatron_sr1.model.transformer_config import vision_transformer_config
from megatron_sr1.records import VisionInputs
from megatron_sr1.runtime.groups import Group, Groups, share_out


@dataclass(frozen=True)
class RowLayout:
    """Order of the merged tokens of a micro-batch's images for windowed attention.

    `order` and `positions` are those of `image_layout` for all images, one after the other, and
    `inverse` undoes `order`; `windows` and `images` pack the row by windows and by frames.
    """

    order: torch.Tensor
    inverse: torch.Tensor
    positions: torch.Tensor
    windows: PackedRow
    images: PackedRow


@lru_cache(maxsize=4096)
def image_layout(
    time: int, height: int, width: int, merge: int, window: int
) -> tuple[torch.Tensor, torch.Tensor, tuple[int, ...]]:
    """Return the window order of one image of time frames and height x width patches.

    `merge` is the side of a merged token in patches, `window` that of a window in merged tokens.
    Raises DataError if the grid is not a multiple of the merge size.

    Returns:
        [merged tokens] int64, the token at each position of the window order; [patches, 2] int64,
        row and column of each patch in that order; and the number of patches of each window.
    """
    if height % merge or width % merge or min(time, height, width) < 1:
        raise DataError(
            f"image grid {time} x {height} x {width} patches: height and width must be multiples "
            f"of {merge}; resize the image with the model's own processor"
        )
    rows, columns = height // merge, width // merge
    frame, row, column = torch.meshgrid(
        torch.arange(time), torch.arange(rows), torch.arange(columns), indexing="ij"
    )
    across, down = -(-columns // window), -(-rows // window)
    window_ids = ((frame * down + row // window) * across + column // window).flatten()
    order = torch.argsort(window_ids, stable=True)
    in_row, in_column = torch.meshgrid(torch.arange(merge), torch.arange(merge), indexing="ij")
    patch_rows = row.flatten()[order, None] * merge + in_row.flatten()
    patch_columns = column.flatten()[order, None] * merge + in_column.flatten()
    positions = torch.stack([patch_rows.flatten(), patch_columns.flatten()], dim=-1)
    return order, positions, tuple((torch.bincount(window_ids) * merge**2).tolist())


def row_layout(
    grids: tuple[tuple[int, int, int], ...], merge: int, window: int, device: torch.device
) -> RowLayout:
    """Return the layout of images with these (time, height, width) grids, at least one."""
    layouts = [image_layout(*grid, merge, window) for grid in grids]
    orders, positions, lengths = zip(*layouts, strict=True)
    firsts = accumulate((len(order) for order in orders[:-1]), initial=0)
    order = torch.cat([order + first for order, first in zip(orders, firsts, strict=True)])
    return RowLayout(
        order=order.to(device),
        inverse=order.argsort().to(device),
        positions=torch.cat(positions).to(device),
        windows=_pack([n for windows in lengths for n in windows], device),
        images=_pack([h * w for t, h, w in grids for _ in range(t)], device),
    )


class VisionSelfAttention(SelfAttention):
    """Self-attention of a vision block: over windows, in some blocks over the image."""

    def __init__(self, *args: Any, full_attention_blocks: tuple[int, ...], **kwargs: Any) -> None:
        """Build Megatron's self-attention; block numbers count from 0."""
        super().__init__(*args, **kwargs)
        self.is_full = self.layer_number - 1 in full_attention_blocks

    def forward(  # type: ignore[override]
        self, *args: Any, packed_seq_params: tuple[PackedRow, PackedRow], **kwargs: Any
    ) -> Any:
        """Attend over one of the given rows: packed by windows, packed by images."""
        windows, images = packed_seq_params
        row = images if self.is_full else windows
        return super().forward(*args, packed_seq_params=row, **kwargs)


class PatchMerger(MegatronModule):
    """Norm, then an MLP over the patches of each merged token, which are adjacent."""

    def __init__(
        self, config: TransformerConfig, vision: VisionConfig, layers: Kernels, tp_group: Any
    ) -> None:
        """Build the merger, whose linear layers are split over the ranks of `tp_group`."""
        super().__init__(config=config)
        self.merged_size = width = vision.hidden_size * vision.spatial_merge_size**2
        self.norm = layers.norm(config, vision.hidden_size, config.layernorm_epsilon)
        common: dict[str, Any] = {"config": config, "init_method": config.init_method, "bias": True}
        common |= {"skip_bias_add": False, "is_expert": False, "tp_group": tp_group}
        self.linear_fc1 = layers.column_linear(width, width, gather_output=False, **common)
        self.linear_fc2 = layers.row_linear(
            width, vision.out_hidden_size, input_is_parallel=True, **common
        )

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Merge [patches, 1, width] into [merged tokens, 1, width of the language model]."""
        merged = self.norm(hidden).reshape(-1, 1, self.merged_size)
        inner, _ = self.linear_fc1(merged)
        return self.linear_fc2(F.gelu(inner))[0]


class VisionModel(MegatronModule):
    """Patch embedding, blocks and merger."""

    def __init__(
        self, text: TransformerConfig, hf_config: HFConfig, groups: Groups, spec: str
    ) -> None:
        """Build the tower, split over the tensor-parallel ranks or whole on each of them.

        `text` is the configuration of the language model's layers, `spec` names the kernels.
        """
        vision = hf_config.vision
        config = vision_transformer_config(text, vision, groups.tower.size)
        super().__init__(config=config)
        self.vision = vision
        collection = copy.copy(groups.collection)
        collection.tp = groups.tower.process_group
        self.patch_embed = torch.nn.Linear(
            vision.patch_dim,
            vision.hidden_size,
            bias=False,
            dtype=config.params_dtype,
            device="cpu" if config.use_cpu_initialization else torch.cuda.current_device(),
        )
        layers = kernels(spec)
        attention = layers.layer.submodules.self_attention
        attention.module = VisionSelfAttention
        attention.params = {
            "attn_mask_type": AttnMaskType.no_mask,
            "full_attention_blocks": vision.full_attention_blocks,
        }
        self.decoder = TransformerBlock(
            config=config,
            spec=TransformerBlockSubmodules(layer_specs=[layers.layer] * vision.depth),
            post_layer_norm=False,
            pg_collection=collection,
        )
        self.merger = PatchMerger(config, vision, layers, collection.tp)
        for parameter in self.parameters() if groups.tower.size < groups.tensor.size else ():
            # Each rank has the gradient of its own images, and encode_by_turns sums the equal
            # gradients of the tensor-parallel ranks: the gradient is the mean over the ranks.
            parameter.average_gradients_across_tp_domain = True  # type: ignore[attr-defined]
            parameter.tensor_model_parallel = False  # type: ignore[attr-defined]

    def forward(self, inputs: VisionInputs) -> torch.Tensor:
        """Return features [merged tokens, width of the language model] in the images' order."""
        vision, device = self.vision, self.patch_embed.weight.device
        merge = vision.spatial_merge_size
        grids = tuple((t, h, w) for t, h, w in inputs.image_grid_thw.tolist())
        layout = row_layout(grids, merge, vision.window_units, device)
        # Pixels need no gradient, so reordering them is cheaper than reordering features.
        patches = inputs.pixel_values.to(device, self.patch_embed.weight.dtype)
        patches = patches.unflatten(0, (-1, merge**2)).index_select(0, layout.order).flatten(0, 1)
        hidden = self.patch_embed(patches).unsqueeze(1)
        if torch.is_grad_enabled() and not hidden.requires_grad:
            # Recomputation requires an input with a gradient; a frozen embedding has none.
            hidden.requires_grad_(self.config.recompute_granularity == "full")
        hidden = self.decoder(
            hidden_states=hidden,
            attention_mask=None,
            rotary_pos_emb=vision_angles(layout.positions, vision.head_dim, vision.rope_theta),
            packed_seq_params=(layout.windows, layout.images),
        )
        return self.merger(hidden)[:, 0].index_select(0, layout.inverse)


def encode_by_turns(tower: VisionModel, inputs: VisionInputs, group: Group) -> torch.Tensor:
    """Return the features of all images, each encoded on one rank; collective over the group.

    Tower and inputs are the same on all ranks. Features are [merged tokens, width], in the images'
    order. In the backward pass a feature's gradient is summed over the ranks and goes to the one
    that encoded it: context-parallel ranks each had a share of the row. Tensor-parallel ranks had
    equal copies, so there the sum is too large by their number, which `VisionModel` accounts for.
    Raises DataError if grids and pixels do not match.
    """
    grids = [(t, h, w) for t, h, w in inputs.image_grid_thw.tolist()]
    sizes = [t * h * w for t, h, w in grids]
    if sum(sizes) != len(inputs.pixel_values):
        raise DataError(
            f"image grids {grids} name {sum(sizes)} patches, pixel_values hold "
            f"{len(inputs.pixel_values)}"
        )
    if group.size == 1:
        return tower(inputs)
    merged = tower.vision.spatial_merge_size**2
    shares = [sorted(share) for share in share_out(sizes, group.size)]
    counts = [sum(sizes[i] for i in share) // merged for share in shares]
    pixels, parts = inputs.pixel_values.split(sizes), []
    if own := shares[group.rank]:
        mine = VisionInputs(torch.cat([pixels[i] for i in own]), inputs.image_grid_thw[own])
        parts.append(tower(mine))
    # All ranks contribute equally many rows. The padding requires a gradient, so that every rank
    # takes part in the backward sum, also one without images or with a frozen tower.
    padding = torch.zeros(
        max(counts) - counts[group.rank],
        tower.vision.out_hidden_size,
        dtype=tower.config.params_dtype,
        device=inputs.pixel_values.device,
        requires_grad=torch.is_grad_enabled(),
    )
    whole = gather_from_sequence_parallel_region(
        torch.cat([*parts, padding]), group=group.process_group
    )
    features: dict[int, torch.Tensor] = {}
    for share, rows in zip(shares, whole.split(max(counts)), strict=True):
        lengths = [sizes[i] // merged for i in share]
        features |= zip(share, rows[: sum(lengths)].split(lengths), strict=True)
    return torch.cat([features[i] for i in range(len(sizes))])


def feature_numbers(inputs: VisionInputs, merge: int) -> torch.Tensor:
    """Return the index of the feature at each image token, [image tokens] int64 on the host.

    An image may occur several times. `merge` is the side of a merged token in patches.
    """
    sizes = inputs.image_grid_thw.cpu().prod(dim=-1) // merge**2
    numbers = torch.arange(int(sizes.sum()))
    if inputs.occurrences is None:
        return numbers
    parts = numbers.split(sizes.tolist())
    return torch.cat([parts[image] for image in inputs.occurrences.tolist()])


def _pack(lengths: list[int], device: torch.device) -> PackedRow:
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
    return pack_row(split_row(cu_seqlens), is_causal=False)
