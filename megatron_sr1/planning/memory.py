"""Memory of one rank by kind, during an update and while the engine samples.

Weights, gradients and optimizer state are exact: the parameters of the checkpoints' name mapping,
split as Megatron splits them and padded as its buffers are
(megatron/core/distributed/param_and_grad_buffer.py). With the distributed optimizer each parameter
starts at a multiple of 64 elements and each bucket ends at a multiple of lcm(ranks, 128); a tied
embedding of a pipeline has a bucket of its own, each virtual stage a buffer of its own. Transformer
Engine's fused layers order the parameters differently, which changes the padding by a few elements.

Activations are the tensors that autograd keeps in our layers (model/layers.py, local kernels);
tests/unit/test_planning_activations.py compares them with what it keeps on a CPU.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

from megatron_sr1.checkpoint.mapping import EMBEDDING, OUTPUT, TOWER, Entry, entries, is_frozen
from megatron_sr1.config.run import Config
from megatron_sr1.data.images import largest_pixels
from megatron_sr1.model.hf_config import HFConfig
from megatron_sr1.planning.costs import ENGINE_RESERVED_BYTES, RESERVED_BYTES
from megatron_sr1.planning.engine_time import Replica
from megatron_sr1.planning.layout import Layout, in_flight
from megatron_sr1.planning.workload import DTYPE_BYTES, PlannedRun, numel, pixels_per_token

PARAMETER_ALIGNMENT = 64
BUCKET_ALIGNMENT = 128
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")


@dataclass(frozen=True)
class Memory:
    """Memory of a rank, bytes.

    Attributes:
        activations: by kind, during an update; those of layers are of all micro-batches in flight.
        engine: by kind, while it is awake; empty without an engine.
        training: total during an update.
        rollout: total while the engine samples; 0 without an engine.
    """

    static: StaticMemory
    activations: Mapping[str, float]
    engine: Mapping[str, float]
    training: float
    rollout: float

    @property
    def peak(self) -> float:
        """Maximum over an update and a rollout."""
        return max(self.training, self.rollout)


@dataclass(frozen=True)
class StaticMemory:
    """Memory that a rank holds during the whole run, bytes, with the padding of its buffer.

    `optimizer` is the state on the GPU, `host` the state in host memory.
    """

    weights: int
    gradients: int
    optimizer: int
    host: int

    @property
    def device(self) -> int:
        """Total on the GPU."""
        return self.weights + self.gradients + self.optimizer

    def beside_engine(self, make_room: str) -> int:
        """Total on the GPU while the engine samples, by `rollout.make_room`."""
        gradients = self.gradients if make_room == "none" else 0
        return self.weights + gradients + (0 if make_room == "optimizer" else self.optimizer)


def rank_memory(
    run: PlannedRun, layout: Layout, pipeline_rank: int, replica: Replica | None
) -> Memory:
    """Return the memory of a pipeline rank, with `replica` unless nothing is sampled."""
    config, kept = run.config, activations_of(run, layout)
    static = static_memory(config, run.hf_config, layout, pipeline_rank)
    tokens = run.max_row_tokens / layout.context
    text, vision = _in_layers(run, kept, pipeline_rank)
    is_last = pipeline_rank == layout.pipeline - 1
    activations = {
        "text activations": text + (tokens * kept.text_ends() if is_last else 0.0),
        "vision activations": vision,
        "recomputed layer": tokens * kept.recomputed(),
        "logits": kept.logits(config.model.logprob_chunk_tokens) if is_last else 0.0,
    }
    training = static.device + sum(activations.values()) + RESERVED_BYTES
    if replica is None:
        return Memory(static, activations, {}, training, rollout=0.0)
    cache = max(replica.cache_bytes, 0.0)
    engine = {"engine weights": replica.weight_bytes, "engine KV cache": cache}
    awake = max(replica.memory_bytes, replica.weight_bytes + ENGINE_RESERVED_BYTES)
    rollout = static.beside_engine(config.rollout.make_room) + RESERVED_BYTES + awake
    if config.rollout.sleep_level == 0:
        training += replica.memory_bytes
    return Memory(static, activations, engine, training, rollout)


@dataclass(frozen=True)
class Activations:
    """Activations that a rank keeps for the backward pass, bytes per token or patch.

    In the formulas e is `dtype_bytes`, h the hidden size, q and k the widths of queries and keys.

    Attributes:
        fused_mlp: activation and product of the MLP are one kernel, as on a GPU; on a CPU each
            intermediate result is kept.
        fused_norm: Transformer Engine's norms, which keep no float32 copy.
    """

    hf_config: HFConfig
    layout: Layout
    dtype_bytes: int = 2
    fused_mlp: bool = True
    fused_norm: bool = False

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
        attention = (3 * q + 3 * k) * e + 4 * text.num_attention_heads
        if layout.context > 1:
            attention += 2 * k * e * layout.context  # keys and values of the whole row
        mlp = 0 if recompute == "selective" else self._mlp(text.intermediate_size)
        norms = 2 * self._norm(text.hidden_size) / layout.sequence_split
        return tables + norms + (attention + mlp) / layout.tensor

    def text_ends(self) -> float:
        """Return the bytes of the final norm and the logprobs per token, logits left out."""
        split, width = self.layout.sequence_split, self.hf_config.text.hidden_size
        gathered = width * self.dtype_bytes if split > 1 else 0
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
            blocks = vision.depth * (tables + 2 * self._norm(h) + mlp / tower) + attention / tower
        # The pixels, the merger's norm, its first product before and after the activation.
        ends = vision.patch_dim * e + self._norm(h) + 2 * h * e / tower
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
        return rows * (chunk_tokens * (4 + low_precision) + text.hidden_size * gradients)

    def _norm(self, width: int) -> float:
        """Input in float32, normalized input, output; the inverse root mean square of each row."""
        e = self.dtype_bytes
        return 2 * width * e + 4 if self.fused_norm else width * (4 + 2 * e) + 4

    def _mlp(self, width: int) -> float:
        """Gate, value and their product; unfused, also both operands of the product."""
        return (3 if self.fused_mlp else 5) * width * self.dtype_bytes


def activations_of(run: PlannedRun, layout: Layout) -> Activations:
    """Return the activations of a run on a GPU."""
    fused_norm = run.config.model.spec == "transformer_engine"
    return Activations(run.hf_config, layout, run.dtype_bytes, fused_norm=fused_norm)


def _in_layers(run: PlannedRun, kept: Activations, pipeline_rank: int) -> tuple[float, float]:
    """Bytes of the text layers and of the tower, of all micro-batches in flight."""
    layout = kept.layout
    layers = layout.layers(run.hf_config.text.num_layers)
    layer = run.max_row_tokens / layout.context * kept.text_layer(layout.recompute)
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


@dataclass(frozen=True)
class Parameter:
    """A rank's part of a parameter, in elements; `is_shared` marks the two tied copies."""

    name: str
    numel: int
    is_trained: bool
    is_shared: bool


def stage_parameters(
    hf_config: HFConfig, layout: Layout, stage: int, freeze: Sequence[str] = ()
) -> tuple[Parameter, ...]:
    """Return a rank's part of the parameters of a stage, in the order of the model.

    Stages are counted from 0, virtual ones included; `freeze` are patterns of `model.freeze`.
    """
    layers = layout.layers(hf_config.text.num_layers)[stage]
    return _cut(hf_config, layout.tensor, layout.tower, layers, tuple(freeze))


@lru_cache(maxsize=1024)
def _cut(
    hf_config: HFConfig, tensor: int, tower: int, layers: range, freeze: tuple[str, ...]
) -> tuple[Parameter, ...]:
    is_first, is_last = layers.start == 0, layers.stop == hf_config.text.num_layers
    found = []
    for entry in entries(hf_config):
        is_vision, layer = entry.name.startswith(TOWER), _LAYER.search(entry.name)
        is_tied = entry.name == EMBEDDING and hf_config.tie_word_embeddings
        is_shared = is_tied and not (is_first and is_last)
        if layer and not is_vision:
            is_here = int(layer[1]) in layers
        else:
            is_here = is_first if is_vision or entry.name == EMBEDDING else is_last
        own = _own_numel(entry, tower if is_vision else tensor)
        is_trained = not is_frozen(entry, freeze)
        if is_here:
            found.append(Parameter(entry.name, own, is_trained, is_shared))
        if is_shared and is_last:
            found.append(Parameter(OUTPUT, own, is_trained, is_shared))
    return tuple(sorted(found, key=lambda parameter: _model_order(parameter.name)))


def static_memory(
    config: Config, hf_config: HFConfig, layout: Layout, pipeline_rank: int, data_rank: int = 0
) -> StaticMemory:
    """Return a rank's static memory; of those that share the state, `data_rank` 0 holds most."""
    frozen = buffer = own = 0
    for stage in layout.stages(pipeline_rank):
        parameters = stage_parameters(hf_config, layout, stage, config.model.freeze)
        trained = [p for p in parameters if p.is_trained]
        frozen += sum(p.numel for p in parameters if not p.is_trained)
        values = kept = sum(p.numel for p in trained)
        if config.parallel.distributed_optimizer:
            values, kept = _sharded(trained, layout.num_sharing, data_rank)
        buffer, own = buffer + values, own + kept
    # Two moments and master weights (or rounding errors); float32 weights need no copy.
    state_values = 2 if config.model.dtype == "float32" else 3
    state = own * state_values * DTYPE_BYTES[config.optimizer.state]
    return StaticMemory(
        weights=(buffer + frozen) * DTYPE_BYTES[config.model.dtype],
        gradients=buffer * DTYPE_BYTES[config.optimizer.gradients],
        optimizer=0 if config.optimizer.offload else state,
        host=state if config.optimizer.offload else 0,
    )


def _own_numel(entry: Entry, tensor: int) -> int:
    if entry.shard_dim is None:
        return numel(entry)
    if entry.form == "vocabulary":
        rows, width = entry.hf_shapes[0]
        return -(-rows // tensor) * width
    return numel(entry) // tensor


def _model_order(name: str) -> tuple[int, int, int]:
    """Sort key: the language model before the tower; in a layer, linear_proj before linear_qkv."""
    layer = _LAYER.search(name)
    if name.startswith(TOWER):
        place = 4 if layer is None and "patch_embed" in name else 5 if layer else 6
    else:
        place = 1 if layer else 0 if name == EMBEDDING else 3 if name == OUTPUT else 2
    parts = ("input_layernorm", "linear_proj", "linear_qkv")
    within = next((i for i, part in enumerate(parts) if part in name), len(parts))
    return place, int(layer[1]) if layer else 0, within


def _sharded(parameters: Sequence[Parameter], ranks: int, rank: int) -> tuple[int, int]:
    """Elements of the padded buffer of trained parameters, and those whose state a rank keeps."""
    start, own = 0, 0
    # A buffer reverses the order of the model; a tied embedding is its own bucket.
    for _, bucket in groupby(reversed(parameters), key=lambda parameter: parameter.is_shared):
        places, stop = [], start
        for parameter in bucket:
            begin = _up(stop, PARAMETER_ALIGNMENT)
            stop = begin + parameter.numel
            places.append((begin, stop))
        end = _up(stop, math.lcm(ranks, BUCKET_ALIGNMENT))
        share = (end - start) // ranks
        low, high = start + rank * share, start + (rank + 1) * share
        own += sum(max(0, min(stop, high) - max(begin, low)) for begin, stop in places)
        start = end
    return start, own


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
