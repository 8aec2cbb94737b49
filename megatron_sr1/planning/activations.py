"""Activations that a rank keeps for the backward pass.

They are the tensors that autograd keeps in our layers (model/layers.py, local kernels);
tests/unit/test_planning_activations.py compares them with what it keeps on a CPU. Frozen weights
have no gradient, so their inputs are kept only if adapters or another operation need them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_sr1.data.images import largest_pixels
from megatron_sr1.model.hf_config import HFConfig
from megatron_sr1.planning.adapters import Adapters
from megatron_sr1.planning.layout import Layout, in_flight
from megatron_sr1.planning.workload import PlannedRun, pixels_per_token


@dataclass(frozen=True)
class Activations:
    """Activations that a rank keeps for the backward pass, bytes per token or patch.

    In the formulas e is `dtype_bytes`, h the hidden size, q and k the widths of queries and keys.

    Attributes:
        fused_mlp: activation and product of the MLP are one kernel, as on a GPU; on a CPU each
            intermediate result is kept.
        fused_norm: Transformer Engine's norms, which keep no float32 copy.
        adapters: what is trained in place of the model; None: the model.
    """

    hf_config: HFConfig
    layout: Layout
    dtype_bytes: int = 2
    fused_mlp: bool = True
    fused_norm: bool = False
    adapters: Adapters | None = None

    def text_layer(self, recompute: str) -> float:
        """Return the bytes of a decoder layer per token of the rank's share of a row.

        `recompute` is none, selective (the MLP) or full (only the layer's input is kept).
        """
        text, layout, e = self.hf_config.text, self.layout, self.dtype_bytes
        if recompute == "full":
            return text.hidden_size * e / layout.sequence_split
        q = text.num_attention_heads * text.head_dim
        k = text.num_key_value_heads * text.head_dim
        tables = 4 * text.head_dim * e  # cosine and sine, for queries and for keys
        # Projected q, k and v, rotated q and k, the output, the logsumexp of each row.
        attention: float = (3 * q + 3 * k) * e + 4 * text.num_attention_heads
        if self.adapters is not None:  # rotated q and k, v, what each sequence gives
            attention -= (q + k) * e - self._adapted(False, "linear_proj")
        if layout.context > 1:
            attention += 2 * k * e * layout.context  # keys and values of the whole row
        before = [self._adapted(False, kind) for kind in ("linear_qkv", "linear_fc1")]
        norms = 2 * self._norm(text.hidden_size)
        if recompute == "selective":
            mlp, before[1] = 0.0, 0.0
            norms += text.hidden_size * e if self.adapters else 0.0  # the input of what is repeated
        else:
            mlp = self._mlp(text.intermediate_size) + self._adapted(False, "linear_fc2")
        split = (norms + sum(before)) / layout.sequence_split
        return tables + split + (attention + mlp) / layout.tensor

    def text_matrices(self, recompute: str) -> float:
        """Return the bytes that a decoder layer keeps whatever its tokens, of adapters."""
        if self.adapters is None or recompute == "full":
            return 0.0
        kinds = ["linear_qkv", "linear_proj"]
        kinds += [] if recompute == "selective" else ["linear_fc1", "linear_fc2"]
        return self.adapters.matrices(False, *kinds) / self.layout.tensor

    def text_ends(self) -> float:
        """Return the bytes of the final norm and the logprobs per token, logits left out."""
        split, width = self.layout.sequence_split, self.hf_config.text.hidden_size
        gathered = width * self.dtype_bytes if split > 1 or self.adapters else 0
        return self._norm(width) / split + gathered + 24  # labels, normalizers, entropies

    def vision(self, recompute: str) -> float:
        """Return the bytes of tower and merger per patch.

        Both kinds of recomputation keep only the inputs of the blocks.
        """
        vision, tower, e = self.hf_config.vision, self.layout.tower, self.dtype_bytes
        h, merged = vision.hidden_size, vision.spatial_merge_size**2
        full = len(vision.full_attention_blocks)
        blocks: float = vision.depth * h * e
        if recompute == "none":
            tables = 4 * vision.head_dim * e
            # Windows copy parts of q, k and v; full attention keeps the projected ones too.
            attention = ((vision.depth - full) * 5 + full * 6) * h * e
            mlp = self._mlp(vision.intermediate_size) + 4 * vision.num_heads
            kinds = ("linear_qkv", "linear_fc1", "linear_fc2")
            inputs = [self._adapted(True, kind) for kind in kinds]
            mlp += inputs.pop() + self._adapted(True, "linear_proj", is_counted=True)
            whole = tables + 2 * self._norm(h) + sum(inputs)
            blocks = vision.depth * (whole + mlp / tower) + attention / tower
        # The pixels, the merger's norm, its first product before and after the activation.
        ends = vision.patch_dim * e + self._norm(h) + 2 * h * e / tower
        if self.adapters is not None:  # the products with pixels and of the merger are frozen
            ends += self.adapters.kept_by_merger - vision.patch_dim * e - h * e / tower
        return blocks + ends + vision.out_hidden_size * e / merged + 24  # features, patch orders

    def recomputed(self) -> float:
        """Return the bytes of the one layer that is being recomputed, per token."""
        if self.layout.recompute == "none":
            return 0.0
        if self.layout.recompute == "selective":
            return self._mlp(self.hf_config.text.intermediate_size) / self.layout.tensor
        return self.text_layer("none")

    def logits(self, chunk_tokens: int) -> float:
        """Return the peak of chunked logits and the output layer's gradient, bytes.

        A chunk's logits exist in the activations' dtype and in float32 (model/logprobs.py). The
        weight gradient is summed in float32; a chunk's part of it is computed in the weight's dtype
        and cast to float32 to be added.
        """
        e, text = self.dtype_bytes, self.hf_config.text
        rows = -(-text.vocab_size // self.layout.tensor)
        low_precision = e if e < 4 else 0
        gradients = 4 + (low_precision + 4 if low_precision else 0)
        if self.adapters is not None:  # a frozen output layer has none
            gradients = 0
        return rows * (chunk_tokens * (4 + low_precision) + text.hidden_size * gradients)

    def _norm(self, width: int) -> float:
        """Input in float32, normalized input, output; the inverse root mean square of each row.

        Frozen weights, of the norm and of the layer after it, need neither of the last two.
        """
        e, num_kept = self.dtype_bytes, 0 if self.adapters else 2
        if self.fused_norm:
            return (num_kept or 1) * width * e + 4
        return width * (4 + num_kept * e) + 4

    def _mlp(self, width: int) -> float:
        """Gate, value and their product; unfused, also both operands of the product.

        A frozen layer does not need the product.
        """
        num_kept = (3 if self.fused_mlp else 5) - (self.adapters is not None)
        return num_kept * width * self.dtype_bytes

    def _adapted(self, is_vision: bool, kind: str, is_counted: bool = False) -> float:
        """Bytes per token that the adapters of a linear layer keep, not split over ranks."""
        if self.adapters is None:
            return 0.0
        return sum(self.adapters.kept(is_vision, kind, is_counted))


def activations_of(run: PlannedRun, layout: Layout) -> Activations:
    """Return the activations of a run on a GPU."""
    fused_norm = run.config.model.spec == "transformer_engine"
    return Activations(
        run.hf_config, layout, run.dtype_bytes, fused_norm=fused_norm, adapters=run.adapters
    )


def in_layers(run: PlannedRun, kept: Activations, pipeline_rank: int) -> tuple[float, float]:
    """Return the bytes of the text layers and of the tower, of all micro-batches in flight."""
    layout = kept.layout
    layers = layout.layers(run.hf_config.text.num_layers)
    layer = run.max_row_tokens / layout.context * kept.text_layer(layout.recompute)
    layer += kept.text_matrices(layout.recompute)
    text = [layer * len(layers[stage]) for stage in layout.stages(pipeline_rank)]
    vision = 0.0
    if pipeline_rank == 0 and run.trains_tower:
        vision = max_patches(run, layout) * kept.vision(layout.recompute)
    counts = in_flight(layout, pipeline_rank, [text[0] + vision, *text[1:]])
    return sum(n * size for n, size in zip(counts, text, strict=True)), counts[0] * vision


def max_patches(run: PlannedRun, layout: Layout) -> float:
    """Return the patches of the longest row that a rank encodes: at least one largest image."""
    if not run.image_tokens:
        return 0.0
    expected = run.max_row_tokens * run.image_tokens / run.sequence_tokens
    per_token = pixels_per_token(run.hf_config)
    limits = run.config.data.min_pixels, run.config.data.max_pixels
    largest = min(largest_pixels(*limits, math.isqrt(per_token)) / per_token, run.max_row_tokens)
    return max(expected / layout.images, largest) * run.patches_per_token
