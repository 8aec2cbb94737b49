"""Memory of one rank by kind, during an update and while the engine samples.

In: a run, a layout, a pipeline rank, the engine replica. Out: bytes at the worst moment of the
pipeline's schedule. Activations are the tensors that autograd keeps in our layers (model/layers.py,
local kernels), each named where it is added up; tests/unit/test_planning_activations.py compares
them with what it keeps on a CPU.

In the formulas e is the size of an activation's dtype in bytes, h the hidden size, q and k the
widths of queries and of keys, f the width of the MLP.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_sr1.data.images import largest_pixels
from megatron_sr1.model.hf_config import HFConfig
from megatron_sr1.planning.costs import ENGINE_RESERVED_BYTES, RESERVED_BYTES
from megatron_sr1.planning.engine_time import Replica
from megatron_sr1.planning.layout import Layout
from megatron_sr1.planning.schedule import in_flight
from megatron_sr1.planning.static_memory import StaticMemory, static_memory
from megatron_sr1.planning.workload import PlannedRun, pixels_per_token


@dataclass(frozen=True)
class Kernels:
    """Kernel properties that decide which activations a layer keeps.

    Attributes:
        dtype_bytes: size of an activation.
        fused_mlp: activation and product of the MLP are one kernel, as on a GPU; on a CPU each
            intermediate result is kept.
        fused_norm: Transformer Engine's norms, which keep no float32 copy.
    """

    dtype_bytes: int = 2
    fused_mlp: bool = True
    fused_norm: bool = False


def kernels_of(run: PlannedRun) -> Kernels:
    """Return the kernels that a run uses on a GPU."""
    return Kernels(run.dtype_bytes, fused_norm=run.config.model.spec == "transformer_engine")


@dataclass(frozen=True)
class Memory:
    """Memory of a rank by kind, bytes.

    Attributes:
        static: weights, gradients, optimizer state.
        text: activations of the language model, of all micro-batches in flight.
        vision: activations of the tower, likewise.
        recomputed: activations of the layer that is being recomputed.
        logits: one chunk of logits, with the output layer's gradient.
        engine_weights: weights of the engine while it is awake.
        cache: its keys and values.
        training: total during an update.
        rollout: total while the engine samples; 0 without an engine.
    """

    static: StaticMemory
    text: float
    vision: float
    recomputed: float
    logits: float
    engine_weights: float
    cache: float
    training: float
    rollout: float

    @property
    def peak(self) -> float:
        """Maximum over an update and a rollout."""
        return max(self.training, self.rollout)


def rank_memory(
    run: PlannedRun, layout: Layout, pipeline_rank: int, replica: Replica | None
) -> Memory:
    """Return the memory of a pipeline rank, with `replica` unless nothing is sampled."""
    config, hf_config, kernels = run.config, run.hf_config, kernels_of(run)
    static = static_memory(config, hf_config, layout, pipeline_rank)
    tokens = run.max_row_tokens / layout.context
    text, vision = _activations(run, layout, kernels, pipeline_rank)
    logits = 0.0
    if pipeline_rank == layout.pipeline - 1:
        text += tokens * text_ends_bytes(hf_config, layout, kernels)
        logits = logits_bytes(hf_config, layout, kernels, config.model.logprob_chunk_tokens)
    recomputed = tokens * recomputed_bytes(hf_config, layout, kernels)
    training = static.device + text + vision + logits + recomputed + RESERVED_BYTES
    rollout = engine_weights = cache = 0.0
    if replica is not None:
        engine_weights, cache = replica.weight_bytes, max(replica.cache_bytes, 0.0)
        rollout = static.device + RESERVED_BYTES
        rollout += max(replica.memory_bytes, engine_weights + ENGINE_RESERVED_BYTES)
        training += replica.memory_bytes if config.rollout.sleep_level == 0 else 0.0
    return Memory(
        static, text, vision, recomputed, logits, engine_weights, cache, training, rollout
    )


def _activations(
    run: PlannedRun, layout: Layout, kernels: Kernels, pipeline_rank: int
) -> tuple[float, float]:
    """Bytes of the text layers and of the tower, of all micro-batches in flight."""
    hf_config = run.hf_config
    layers = layout.layers(hf_config.text.num_layers)
    tokens = run.max_row_tokens / layout.context
    layer = tokens * text_layer_bytes(hf_config, layout, kernels, layout.recompute)
    text = [layer * len(layers[stage]) for stage in layout.stages(pipeline_rank)]
    vision = [0.0] * len(text)
    if pipeline_rank == 0 and run.trains_tower:
        per_patch = vision_bytes(hf_config, layout, kernels, layout.recompute)
        vision[0] = _max_patches(run, layout) * per_patch
    held = [sum(both) for both in zip(text, vision, strict=True)]
    counts = in_flight(layout, pipeline_rank, held)
    return sum(n * size for n, size in zip(counts, text, strict=True)), counts[0] * vision[0]


def _max_patches(run: PlannedRun, layout: Layout) -> float:
    """Patches of the longest row that a rank encodes: its share, at least one largest image."""
    work = run.work
    if not work.image_tokens:
        return 0.0
    expected = run.max_row_tokens * work.image_tokens / work.sequence_tokens
    per_token = pixels_per_token(run.hf_config)
    limits = run.config.data.min_pixels, run.config.data.max_pixels
    largest = min(largest_pixels(*limits, math.isqrt(per_token)) / per_token, run.max_row_tokens)
    return max(expected / layout.images, largest) * work.patches_per_token


def text_layer_bytes(
    hf_config: HFConfig, layout: Layout, kernels: Kernels, recompute: str
) -> float:
    """Return the activations of a decoder layer per token of the rank's share of a row.

    Args:
        hf_config: shape of the model.
        layout: of the actor.
        kernels: of the layers.
        recompute: none | selective (the MLP) | full (only the layer's input is kept).
    """
    text, e = hf_config.text, kernels.dtype_bytes
    split = layout.sequence_split
    if recompute == "full":
        return text.hidden_size * e / split
    q = text.num_attention_heads * text.head_dim
    k = text.num_key_value_heads * text.head_dim
    tables = 4 * text.head_dim * e  # cosine and sine, for queries and for keys
    # Projected q, k and v, rotated q and k, the output, the logsumexp of each row.
    attention = (3 * q + 3 * k) * e + 4 * text.num_attention_heads
    if layout.context > 1:
        attention += 2 * k * e * layout.context  # keys and values of the whole row
    mlp = 0 if recompute == "selective" else _mlp(text.intermediate_size, kernels)
    norms = 2 * _norm(text.hidden_size, kernels) / split
    return tables + norms + (attention + mlp) / layout.tensor


def text_ends_bytes(hf_config: HFConfig, layout: Layout, kernels: Kernels) -> float:
    """Return the activations of the final norm and the logprobs per token, logits left out."""
    split = layout.sequence_split
    width = hf_config.text.hidden_size
    gathered = width * kernels.dtype_bytes if split > 1 else 0
    return _norm(width, kernels) / split + gathered + 24  # labels, normalizers, entropies


def vision_bytes(hf_config: HFConfig, layout: Layout, kernels: Kernels, recompute: str) -> float:
    """Return the activations of tower and merger per patch.

    Both kinds of recomputation keep only the inputs of the blocks.
    """
    vision, e = hf_config.vision, kernels.dtype_bytes
    h, merged = vision.hidden_size, vision.spatial_merge_size**2
    full = len(vision.full_attention_blocks)
    if recompute == "none":
        tables = 4 * vision.head_dim * e
        # Windows are copies of parts of q, k and v; full attention keeps the projected ones too.
        windowed, whole = 5 * h * e, 6 * h * e
        block = tables + 2 * _norm(h, kernels)
        block += (_mlp(vision.intermediate_size, kernels) + 4 * vision.num_heads) / layout.tower
        blocks = vision.depth * block
        blocks += ((vision.depth - full) * windowed + full * whole) / layout.tower
    else:
        blocks = vision.depth * h * e
    # The pixels, the merger's norm, its first product before and after the activation.
    ends = vision.patch_dim * e + _norm(h, kernels) + 2 * h * e / layout.tower
    return blocks + ends + vision.out_hidden_size * e / merged + 24  # features, patch orders


def recomputed_bytes(hf_config: HFConfig, layout: Layout, kernels: Kernels) -> float:
    """Return the activations of the one layer that is being recomputed, per token."""
    if layout.recompute == "none":
        return 0.0
    if layout.recompute == "selective":
        return _mlp(hf_config.text.intermediate_size, kernels) / layout.tensor
    return text_layer_bytes(hf_config, layout, kernels, "none")


def logits_bytes(hf_config: HFConfig, layout: Layout, kernels: Kernels, chunk_tokens: int) -> float:
    """Return the peak of chunked logits and the output layer's gradient in the backward pass.

    A chunk's logits exist in the activations' dtype and in float32 (model/logprobs.py). The weight
    gradient is summed in float32; a chunk's part of it is computed in the weight's dtype and cast
    to float32 to be added.
    """
    e, width = kernels.dtype_bytes, hf_config.text.hidden_size
    rows = -(-hf_config.text.vocab_size // layout.tensor)
    low_precision = e if e < 4 else 0
    gradients = 4 + (low_precision + 4 if low_precision else 0)
    return rows * (chunk_tokens * (4 + low_precision) + width * gradients)


def _norm(width: int, kernels: Kernels) -> float:
    """Input in float32, normalized input, output; the inverse root mean square of each row."""
    e = kernels.dtype_bytes
    return 2 * width * e + 4 if kernels.fused_norm else width * (4 + 2 * e) + 4


def _mlp(width: int, kernels: Kernels) -> float:
    """Gate, value and their product; unfused, also both operands of the product."""
    return (3 if kernels.fused_mlp else 5) * width * kernels.dtype_bytes
