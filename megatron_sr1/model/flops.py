"""Floating-point operations of the model, a product of m x k and k x n being 2 m k n.

In: a model's shape, tokens, patches. Out: `Work`: of dense products and of attention apart, as GPUs
do them at different rates. Norms, rotary embedding and the optimizer are not counted: memory bounds
them. tests/unit/test_flops.py counts the same on the real model.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sr1.model.hf_config import HFConfig

ATTENTION_BACKWARD = 2.5
"""Products of attention's backward pass over those of its forward pass: scores are made again."""
CAUSAL_SHARE = 0.5
"""Of the square of a sequence that a causal kernel computes."""


@dataclass(frozen=True)
class Work:
    """Operations of a forward pass.

    Attributes:
        dense: of products with weights.
        attention: of products of queries, keys and values.
    """

    dense: float = 0.0
    attention: float = 0.0

    def __add__(self, other: Work) -> Work:
        """Both, one after the other."""
        return Work(self.dense + other.dense, self.attention + other.attention)

    def times(self, factor: float) -> Work:
        """The same so many times."""
        return Work(self.dense * factor, self.attention * factor)

    @property
    def total(self) -> float:
        """Of both kinds."""
        return self.dense + self.attention


def text_layer(hf_config: HFConfig, tokens: float, keys: float) -> Work:
    """Forward pass of a decoder layer.

    Args:
        hf_config: shape of the model.
        tokens: queries.
        keys: that a query meets, on average; half of its sequence where a causal kernel skips
            the other half.
    """
    text = hf_config.text
    q = text.num_attention_heads * text.head_dim
    k = text.num_key_value_heads * text.head_dim
    weights = text.hidden_size * (2 * q + 2 * k + 3 * text.intermediate_size)
    return Work(2 * tokens * weights, 4 * tokens * keys * q)


def text_mlp(hf_config: HFConfig, tokens: float) -> Work:
    """Forward pass of a layer's MLP: what selective recomputation does again."""
    text = hf_config.text
    return Work(6 * tokens * text.hidden_size * text.intermediate_size)


def head(hf_config: HFConfig, tokens: float) -> Work:
    """Logits of some tokens."""
    return Work(2 * tokens * hf_config.text.hidden_size * hf_config.text.vocab_size)


def text(hf_config: HFConfig, tokens: float, logits: float, before: float = 0) -> Work:
    """Return the forward pass of the language model over the last tokens of a sequence.

    Args:
        hf_config: shape of the model.
        tokens: that are computed.
        logits: tokens among them whose logits are computed.
        before: earlier tokens, whose keys and values are cached.
    """
    layer = text_layer(hf_config, tokens, before + tokens * CAUSAL_SHARE)
    return layer.times(hf_config.text.num_layers) + head(hf_config, logits)


def vision_blocks(hf_config: HFConfig, patches: float, image_patches: float) -> Work:
    """Forward pass of the tower's blocks.

    Args:
        hf_config: shape of the model.
        patches: of all images.
        image_patches: of one image, on average; blocks with full attention meet so many keys.
    """
    vision = hf_config.vision
    h, full = vision.hidden_size, len(vision.full_attention_blocks)
    window = min((vision.window_units * vision.spatial_merge_size) ** 2, image_patches)
    weights = h * (4 * h + 3 * vision.intermediate_size)
    keys = full * image_patches + (vision.depth - full) * window
    return Work(2 * patches * weights * vision.depth, 4 * patches * keys * h)


def patch_embedding(hf_config: HFConfig, patches: float) -> Work:
    """Its backward pass is as long as the forward one: pixels have no gradient."""
    vision = hf_config.vision
    return Work(2 * patches * vision.patch_dim * vision.hidden_size)


def merger(hf_config: HFConfig, patches: float) -> Work:
    """Forward pass of the merger."""
    vision = hf_config.vision
    merge = vision.spatial_merge_size**2
    width = vision.hidden_size * merge
    return Work(2 * patches / merge * width * (width + vision.out_hidden_size))


def vision(hf_config: HFConfig, patches: float, image_patches: float) -> Work:
    """Forward pass of the whole tower."""
    work = vision_blocks(hf_config, patches, image_patches) + patch_embedding(hf_config, patches)
    return work + merger(hf_config, patches)


def patch_cost(hf_config: HFConfig) -> float:
    """What a patch takes in the tower over what a token takes behind it, attention left out."""
    return vision(hf_config, 1, 0).dense / text(hf_config, 1, 1).dense


def backward(work: Work) -> Work:
    """Backward pass of products whose both sides have gradients."""
    return Work(2 * work.dense, ATTENTION_BACKWARD * work.attention)
