"""Bytes of weights, gradients and optimizer state on each rank, exactly as they are allocated.

In: a model's shape, a layout, the settings of docs/memory.md. Out: bytes. The parameters are those
of the checkpoints' name mapping, split as Megatron splits them and padded as its buffers are
(megatron/core/distributed/param_and_grad_buffer.py): with the distributed optimizer each parameter
starts at a multiple of 64 elements and each bucket ends at a multiple of lcm(ranks, 128); a tied
embedding of a pipeline has a bucket of its own, each virtual stage a buffer of its own.

Transformer Engine's fused layers order the parameters differently, which changes the padding by a
few elements.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from megatron_sr1.checkpoint.mapping import EMBEDDING, OUTPUT, TOWER, Entry, entries, is_frozen
from megatron_sr1.config.run import Config
from megatron_sr1.model.hf_config import HFConfig
from megatron_sr1.planning.layout import Layout

DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
PARAMETER_ALIGNMENT = 64
BUCKET_ALIGNMENT = 128
_LAYER = re.compile(r"language_model\.decoder\.layers\.(\d+)\.")


@dataclass(frozen=True)
class Parameter:
    """A rank's part of a parameter, in elements; `is_shared` marks the two tied copies."""

    name: str
    numel: int
    is_trained: bool = True
    is_shared: bool = False


@dataclass(frozen=True)
class StaticMemory:
    """Memory that a rank holds during the whole run, bytes.

    Attributes:
        weights: with the padding of their buffer.
        gradients: of the whole buffer.
        optimizer: state on the GPU.
        host: state in host memory.
    """

    weights: int
    gradients: int
    optimizer: int
    host: int

    @property
    def device(self) -> int:
        """Total on the GPU."""
        return self.weights + self.gradients + self.optimizer


def stage_parameters(
    hf_config: HFConfig, layout: Layout, stage: int, freeze: Sequence[str] = ()
) -> tuple[Parameter, ...]:
    """Return a rank's part of the parameters of a stage, in the order of the model.

    Args:
        hf_config: shape of the model.
        layout: of the actor.
        stage: number of the stage from 0, virtual stages included.
        freeze: patterns of `model.freeze`.
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
        layer, is_vision = _LAYER.match(entry.name), entry.name.startswith(TOWER)
        if layer:
            is_here = int(layer[1]) in layers
        else:
            is_here = is_first if is_vision or entry.name == EMBEDDING else is_last
        numel = _own_numel(entry, tower if is_vision else tensor)
        made = Parameter(entry.name, numel, not is_frozen(entry, freeze))
        if entry.name == EMBEDDING and hf_config.tie_word_embeddings and not (is_first and is_last):
            made = replace(made, is_shared=True)
            found += [replace(made, name=OUTPUT)] if is_last else []
        if is_here:
            found.append(made)
    return tuple(sorted(found, key=_model_order))


def static_memory(
    config: Config, hf_config: HFConfig, layout: Layout, pipeline_rank: int, data_rank: int = 0
) -> StaticMemory:
    """Return the static memory of one rank.

    Args:
        config: of the run.
        hf_config: shape of the model.
        layout: of the actor.
        pipeline_rank: of the rank, from 0.
        data_rank: of the rank among those that share the state; rank 0 holds the most.
    """
    frozen = buffer = own = 0
    for stage in layout.stages(pipeline_rank):
        parameters = stage_parameters(hf_config, layout, stage, config.model.freeze)
        trained = [p for p in parameters if p.is_trained]
        frozen += sum(p.numel for p in parameters if not p.is_trained)
        values = kept = sum(p.numel for p in trained)
        if config.parallel.distributed_optimizer:
            values, kept = _sharded(trained, layout.num_sharing, data_rank)
        buffer, own = buffer + values, own + kept
    weight_bytes = DTYPE_BYTES[config.model.dtype]
    state = own * state_bytes(config)
    return StaticMemory(
        weights=(buffer + frozen) * weight_bytes,
        gradients=buffer * DTYPE_BYTES[config.optimizer.gradients],
        optimizer=0 if config.optimizer.offload else state,
        host=state if config.optimizer.offload else 0,
    )


def state_bytes(config: Config) -> int:
    """Return the optimizer state per parameter; float32 weights are their own master weights."""
    held = DTYPE_BYTES[config.optimizer.state]
    return 2 * held if config.model.dtype == "float32" else 3 * held


def num_parameters(hf_config: HFConfig, part: str = "") -> int:
    """Return the parameters of the published model, or of the part with a name prefix."""
    return sum(_numel(entry) for entry in entries(hf_config) if entry.name.startswith(part))


def _numel(entry: Entry) -> int:
    return sum(math.prod(shape) for shape in entry.hf_shapes)


def _own_numel(entry: Entry, tensor: int) -> int:
    if entry.shard_dim is None:
        return _numel(entry)
    if entry.form == "vocabulary":
        rows, width = entry.hf_shapes[0]
        return -(-rows // tensor) * width
    return _numel(entry) // tensor


def _model_order(parameter: Parameter) -> tuple[int, int, int]:
    """Sort key: the language model before the tower; in a layer, linear_proj before linear_qkv."""
    name = parameter.name
    layer = re.search(r"decoder\.layers\.(\d+)\.", name)
    if name.startswith(TOWER):
        place = 4 if layer is None and "patch_embed" in name else 5 if layer else 6
    else:
        place = 1 if layer else 0 if name == EMBEDDING else 3 if name == OUTPUT else 2
    parts = ("input_layernorm", "linear_proj", "linear_qkv")
    within = next((i for i, part in enumerate(parts) if part in name), len(parts))
    return place, int(layer[1]) if layer else 0, within


def _sharded(parameters: Sequence[Parameter], ranks: int, rank: int) -> tuple[int, int]:
    """Return the elements of the padded buffer, and those whose state a rank keeps.

    Args:
        parameters: trained ones in the order of the model; the buffer has them in reverse.
        ranks: that share each bucket.
        rank: among them.
    """
    start, own = 0, 0
    for bucket in _buckets(parameters):
        places, place = [], start
        for parameter in bucket:
            place = _up(place, PARAMETER_ALIGNMENT)
            places.append((place, place + parameter.numel))
            place += parameter.numel
        end = _up(place, math.lcm(ranks, BUCKET_ALIGNMENT))
        share = (end - start) // ranks
        low, high = start + rank * share, start + (rank + 1) * share
        own += sum(max(0, min(stop, high) - max(begin, low)) for begin, stop in places)
        start = end
    return start, own


def _buckets(parameters: Sequence[Parameter]) -> list[list[Parameter]]:
    buckets: list[list[Parameter]] = [[]]
    for parameter in reversed(parameters):
        if parameter.is_shared:
            buckets += [[parameter], []]
        else:
            buckets[-1].append(parameter)
    return [bucket for bucket in buckets if bucket]


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
