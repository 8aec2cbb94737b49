"""Floating-point operations of the model; a product of m x k and k x n counts 2 m k n.

Products with weights and attention are counted separately, because GPUs run them at different
rates. Norms, rotary embedding and the optimizer are not counted: they are limited by memory.
tests/unit/test_flops.py compares with torch's count of the real model.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sr1.model.hf_config import HFConfig

ATTENTION_BACKWARD = 2.5
"""Operations of attention's backward pass over its forward pass; scores are recomputed."""
CAUSAL_SHARE = 0.5
"""Share of a sequence's square that a causal kernel computes."""


@dataclass(frozen=True)
class Work:
    """Operations of products with weights (`dense`), of attention, and of products in float32.

    The last are those of float32 adapters in a bfloat16 model.
    """

    dense: float = 0.0
    attention: float = 0.0
    float32: float = 0.0

    def __add__(self, other: Work) -> Work:
        """Return the sum."""
        attention = self.attention + other.attention
        return Work(self.dense + other.dense, attention, self.float32 + other.float32)

    def times(self, factor: float) -> Work:
        """Return a multiple."""
        return Work(self.dense * factor, self.attention * factor, self.float32 * factor)

    @property
    def total(self) -> float:
        """Operations of all kinds."""
        return self.dense + self.attention + self.float32


def text_layer(hf_config: HFConfig, tokens: float, keys: float) -> Work:
    """Return the forward pass of a decoder layer.

    `keys` is the mean number of keys per query: half of a sequence with a causal kernel.
    """
    text = hf_config.text
    q = text.num_attention_heads * text.head_dim
    k = text.num_key_value_heads * text.head_dim
    weights = text.hidden_size * (2 * q + 2 * k + 3 * text.intermediate_size)
    return Work(2 * tokens * weights, 4 * tokens * keys * q)


def text_mlp(hf_config: HFConfig, tokens: float) -> Work:
    """Return the forward pass of a decoder layer's MLP, which selective recomputation repeats."""
    return Work(6 * tokens * hf_config.text.hidden_size * hf_config.text.intermediate_size)


def head(hf_config: HFConfig, tokens: float) -> Work:
    """Return the logits of `tokens` tokens."""
    return Work(2 * tokens * hf_config.text.hidden_size * hf_config.text.vocab_size)


def text(hf_config: HFConfig, tokens: float, logits: float, before: float = 0) -> Work:
    """Return the forward pass of the language model over the last tokens of a sequence.

    Keys and values of the `before` earlier tokens are cached; `logits` of the tokens have logits.
    """
    layer = text_layer(hf_config, tokens, before + tokens * CAUSAL_SHARE)
    return layer.times(hf_config.text.num_layers) + head(hf_config, logits)


def vision_blocks(hf_config: HFConfig, patches: float, image_patches: float) -> Work:
    """Return the forward pass of the tower's blocks over the patches of all images.

    `image_patches` is the mean per image, the keys of a query in blocks with full attention.
    """
    vision = hf_config.vision
    h, full = vision.hidden_size, len(vision.full_attention_blocks)
    window = min((vision.window_units * vision.spatial_merge_size) ** 2, image_patches)
    weights = h * (4 * h + 3 * vision.intermediate_size)
    keys = full * image_patches + (vision.depth - full) * window
    return Work(2 * patches * weights * vision.depth, 4 * patches * keys * h)


def patch_embedding(hf_config: HFConfig, patches: float) -> Work:
    """Return the forward pass of the patch embedding; as pixels have no gradient, backward too."""
    vision = hf_config.vision
    return Work(2 * patches * vision.patch_dim * vision.hidden_size)


def merger(hf_config: HFConfig, patches: float) -> Work:
    """Return the forward pass of the merger."""
    vision = hf_config.vision
    merge = vision.spatial_merge_size**2
    width = vision.hidden_size * merge
    return Work(2 * patches / merge * width * (width + vision.out_hidden_size))


def vision(hf_config: HFConfig, patches: float, image_patches: float) -> Work:
    """Return the forward pass of the whole tower; arguments as of `vision_blocks`."""
    work = vision_blocks(hf_config, patches, image_patches) + patch_embedding(hf_config, patches)
    return work + merger(hf_config, patches)


def patch_cost(hf_config: HFConfig) -> float:
    """Return the tower's operations per patch over the decoder's per token, without attention."""
    return vision(hf_config, 1, 0).dense / text(hf_config, 1, 1).dense


def backward(work: Work, is_frozen: bool = False) -> Work:
    """Return the backward pass; frozen weights need no products for their own gradients."""
    products = 1 if is_frozen else 2
    attention = ATTENTION_BACKWARD * work.attention
    return Work(products * work.dense, attention, 2 * work.float32)
