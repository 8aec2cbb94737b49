"""Bytes that a micro-batch leaves behind for its backward pass, of text and of vision.

In: a model's shape, a layout, the tokens and patches of a micro-batch. Out: bytes of one rank. The
terms are the tensors that autograd keeps in our layers (model/specs.py, local kernels), named where
they are added up; tests/unit/test_planning_activations.py compares with what it keeps on a CPU.

Let e be the bytes of the activations' type, h the width, q and k the widths of queries and of keys,
f that of the MLP, d that of a head.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sr1.model.hf_config import HFConfig
from megatron_sr1.planning.layout import Layout


@dataclass(frozen=True)
class Kernels:
    """What decides how much a layer keeps.

    Attributes:
        dtype_bytes: of the activations.
        fused_mlp: gate and product in one kernel, as on a GPU; on a CPU each step is kept.
        fused_norm: Transformer Engine's norms, which keep no float32 copy.
    """

    dtype_bytes: int = 2
    fused_mlp: bool = True
    fused_norm: bool = False


def text_layer_bytes(
    hf_config: HFConfig, layout: Layout, kernels: Kernels, recompute: str
) -> float:
    """Of a decoder layer, a token of the rank's own share of the row.

    Args:
        hf_config: shape of the model.
        layout: of the actor.
        kernels: of the layers.
        recompute: none | selective (the MLP) | full (only the layer's input is kept).
    """
    text, e = hf_config.text, kernels.dtype_bytes
    split = layout.tensor if layout.sequence else 1
    if recompute == "full":
        return text.hidden_size * e / split
    q = text.num_attention_heads * text.head_dim
    k = text.num_key_value_heads * text.head_dim
    tables = 4 * text.head_dim * e  # cosine and sine, for queries and for keys
    # q, k and v as projected, q and k turned, the result, the log of each row's sum.
    attention = (3 * q + 3 * k) * e + 4 * text.num_attention_heads
    if layout.context > 1:
        attention += 2 * k * e * layout.context  # keys and values of the whole row
    mlp = 0 if recompute == "selective" else _mlp(text.intermediate_size, kernels)
    norms = 2 * _norm(text.hidden_size, kernels) / split
    return tables + norms + (attention + mlp) / layout.tensor


def text_ends_bytes(hf_config: HFConfig, layout: Layout, kernels: Kernels) -> float:
    """Of the last norm and of the logprobs beside the logits, a token of the rank's share."""
    split = layout.tensor if layout.sequence else 1
    width = hf_config.text.hidden_size
    gathered = width * kernels.dtype_bytes if split > 1 else 0
    return _norm(width, kernels) / split + gathered + 24  # labels, their normalisers, entropies


def vision_bytes(hf_config: HFConfig, layout: Layout, kernels: Kernels, recompute: str) -> float:
    """Of the tower and the merger, a patch. Any recomputation keeps only the blocks' inputs."""
    vision, e = hf_config.vision, kernels.dtype_bytes
    h, merged = vision.hidden_size, vision.spatial_merge_size**2
    full = len(vision.full_attention_blocks)
    if recompute == "none":
        tables = 4 * vision.head_dim * e
        # Windows are cut out of q, k and v; a block over one image keeps them as projected too.
        cut, whole = 5 * h * e, 6 * h * e
        block = tables + 2 * _norm(h, kernels)
        block += (_mlp(vision.intermediate_size, kernels) + 4 * vision.num_heads) / layout.tensor
        blocks = vision.depth * block
        blocks += ((vision.depth - full) * cut + full * whole) / layout.tensor
    else:
        blocks = vision.depth * h * e
    # The pixels, the merger's norm, its product and what the activation makes of it, the features.
    ends = vision.patch_dim * e + _norm(h, kernels) + 2 * h * e / layout.tensor
    return blocks + ends + vision.out_hidden_size * e / merged + 24  # orders of the patches


def recomputed_bytes(hf_config: HFConfig, layout: Layout, kernels: Kernels) -> float:
    """Of the one layer that is computed again during the backward pass, a token."""
    again = {"none": 0.0, "selective": _mlp(hf_config.text.intermediate_size, kernels)}
    again["selective"] /= layout.tensor
    if layout.recompute in again:
        return again[layout.recompute]
    return text_layer_bytes(hf_config, layout, kernels, "none")


def logits_bytes(hf_config: HFConfig, layout: Layout, kernels: Kernels, chunk_tokens: int) -> float:
    """Of chunks of logits and the output layer's gradient, at their worst moment.

    model/logprobs.py, backward: logits in the activations' type and in float32; the weight's
    gradient is summed in float32, and a chunk's part of it comes in the weight's type and is made
    float32 to be added.
    """
    e, width = kernels.dtype_bytes, hf_config.text.hidden_size
    rows = -(-hf_config.text.vocab_size // layout.tensor)
    other_type = e if e < 4 else 0
    sums = 4 + (other_type + 4 if other_type else 0)
    return rows * (chunk_tokens * (4 + other_type) + width * sums)


def _norm(width: int, kernels: Kernels) -> float:
    """Input in float32, normal form and result; the root of each row."""
    e = kernels.dtype_bytes
    return 2 * width * e + 4 if kernels.fused_norm else width * (4 + 2 * e) + 4


def _mlp(width: int, kernels: Kernels) -> float:
    """Gate and value, the gate activated, both as the product takes them, the product."""
    return (3 if kernels.fused_mlp else 5) * width * kernels.dtype_bytes
