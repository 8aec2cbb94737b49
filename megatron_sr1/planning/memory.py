"""Memory of one rank by kind, during an update and while the engine samples.

Weights, gradients and optimizer state are exact: the parameters of the checkpoints' name mapping,
split as Megatron splits them and padded as its buffers are
(megatron/core/distributed/param_and_grad_buffer.py). With the distributed optimizer each parameter
starts at a multiple of 64 elements and each bucket ends at a multiple of lcm(ranks, 128); a tied
embedding of a pipeline has a bucket of its own, each virtual stage a buffer of its own. Transformer
Engine's fused layers order the parameters differently, which changes the padding by a few elements.

With adapters their parameters alone are trained, in a buffer of their own type; the base's are
frozen. Activations are in activations.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

from megatron_sr1.checkpoint.mapping import (
    EMBEDDING,
    OUTPUT,
    TOWER,
    Entry,
    adapter_entries,
    entries,
    is_frozen,
)
from megatron_sr1.config.adapter import AdapterConfig
from megatron_sr1.config.run import Config
from megatron_sr1.config.training import OptimizerConfig
from megatron_sr1.model.hf_config import HFConfig
from megatron_sr1.planning.activations import activations_of, in_layers
from megatron_sr1.planning.adapters import DTYPE_BYTES, Adapters, planned_adapters
from megatron_sr1.planning.costs import ENGINE_RESERVED_BYTES, RESERVED_BYTES
from megatron_sr1.planning.engine_time import Replica
from megatron_sr1.planning.layout import Layout
from megatron_sr1.planning.workload import PlannedRun, numel

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

    `frozen` and `trained` are weights, `optimizer` is the state on the GPU, `host` the state in
    host memory.
    """

    frozen: int
    trained: int
    gradients: int
    optimizer: int
    host: int

    @property
    def weights(self) -> int:
        """All weights."""
        return self.frozen + self.trained

    @property
    def device(self) -> int:
        """Total on the GPU."""
        return self.weights + self.gradients + self.optimizer

    def beside_engine(self, make_room: str) -> int:
        """Total on the GPU while the engine samples, by `rollout.make_room`."""
        gradients = self.gradients if make_room == "none" else 0
        weights = self.trained if make_room == "weights" else self.weights
        return weights + gradients + (0 if make_room == "optimizer" else self.optimizer)


def rank_memory(
    run: PlannedRun, layout: Layout, pipeline_rank: int, replica: Replica | None
) -> Memory:
    """Return the memory of a pipeline rank, with `replica` unless nothing is sampled."""
    config, kept = run.config, activations_of(run, layout)
    static = static_memory(config, run.hf_config, layout, pipeline_rank)
    tokens = run.max_row_tokens / layout.context
    text, vision = in_layers(run, kept, pipeline_rank)
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
class Parameter:
    """A rank's part of a parameter, in elements; `is_shared` marks the two tied copies."""

    name: str
    numel: int
    is_trained: bool
    is_shared: bool


def stage_parameters(
    hf_config: HFConfig,
    layout: Layout,
    stage: int,
    freeze: Sequence[str] = (),
    adapter: AdapterConfig | None = None,
) -> tuple[Parameter, ...]:
    """Return a rank's part of the parameters of a stage, in the order of the model.

    Stages are counted from 0, virtual ones included; `freeze` are patterns of `model.freeze`. With
    adapters they follow their linear layer's parameters, and are the only ones that are trained.
    """
    layers = layout.layers(hf_config.text.num_layers)[stage]
    if adapter is None or adapter.rank == 0:
        return _cut(hf_config, layout.tensor, layout.tower, layers, tuple(freeze))
    adapted = adapter.rank, tuple(adapter.targets)
    return _cut(hf_config, layout.tensor, layout.tower, layers, adapted=adapted)


@lru_cache(maxsize=1024)
def _cut(
    hf_config: HFConfig,
    tensor: int,
    tower: int,
    layers: range,
    freeze: tuple[str, ...] = (),
    adapted: tuple[int, tuple[str, ...]] | None = None,
) -> tuple[Parameter, ...]:
    is_first, is_last = layers.start == 0, layers.stop == hf_config.text.num_layers
    found = []
    pairs = adapter_entries(hf_config, adapted[1], adapted[0]).values() if adapted else ()
    own_entries = {entry for pair in pairs for entry in pair}
    for entry in (*entries(hf_config), *(entry for pair in pairs for entry in pair)):
        is_vision, layer = entry.name.startswith(TOWER), _LAYER.search(entry.name)
        is_tied = entry.name == EMBEDDING and hf_config.tie_word_embeddings
        is_shared = is_tied and not (is_first and is_last)
        if layer and not is_vision:
            is_here = int(layer[1]) in layers
        else:
            is_here = is_first if is_vision or entry.name == EMBEDDING else is_last
        own = _own_numel(entry, tower if is_vision else tensor)
        is_trained = entry in own_entries if adapted else not is_frozen(entry, freeze)
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
    freeze, adapter = config.model.freeze, config.adapter
    for stage in layout.stages(pipeline_rank):
        parameters = stage_parameters(hf_config, layout, stage, freeze, adapter)
        trained = [p for p in parameters if p.is_trained]
        frozen += sum(p.numel for p in parameters if not p.is_trained)
        values = kept = sum(p.numel for p in trained)
        if config.parallel.distributed_optimizer:
            values, kept = _sharded(trained, layout.num_sharing, data_rank)
        buffer, own = buffer + values, own + kept
    model_bytes = DTYPE_BYTES[config.model.dtype]
    adapters = planned_adapters(hf_config, adapter, config.model.dtype)
    trained_bytes = adapters.dtype_bytes if adapters else model_bytes
    # Two moments and master weights (or rounding errors); float32 weights need no copy.
    state_values = 2 if trained_bytes == 4 else 3
    state = own * state_values * DTYPE_BYTES[config.optimizer.state]
    return StaticMemory(
        frozen=frozen * model_bytes,
        trained=buffer * trained_bytes,
        gradients=buffer * max(DTYPE_BYTES[config.optimizer.gradients], trained_bytes),
        optimizer=0 if config.optimizer.offload else state,
        host=state if config.optimizer.offload else 0,
    )


def checkpoint_bytes(adapters: Adapters, optimizer: OptimizerConfig) -> int:
    """Return the bytes of a checkpoint's tensors with adapters: they and their state, all ranks.

    The state has two moments, and master weights, which Megatron saves of float32 weights too.
    """
    return adapters.numel * (adapters.dtype_bytes + 3 * DTYPE_BYTES[optimizer.state])


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
