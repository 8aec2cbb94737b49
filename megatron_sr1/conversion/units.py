"""What a conversion moves at a time: some published tensors, and where they are in a checkpoint.

In: a model's configuration. Out: its units. A checkpoint of Megatron-Core holds global tensors,
whatever the layout: the layers of a decoder are stacked along a dimension of their own, a norm
before a linear layer is named as in Transformer Engine's fused layer
(megatron/core/models/gpt/gpt_layer_specs.py), and gate and up are halves of one tensor. Tests
compare these places with Megatron's own `sharded_state_dict`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megatron_sr1.checkpoint.hf import check_tensors, with_tied_copy
from megatron_sr1.checkpoint.hf_files import HFSource
from megatron_sr1.checkpoint.mapping import Entry, entries
from megatron_sr1.checkpoint.transforms import publish
from megatron_sr1.model.hf_config import HFConfig, read_hf_config

_FUSED = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}
_LAYER = re.compile(r"((?:vision|language)_model)\.decoder\.layers\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Unit:
    """The smallest part that is moved: a parameter, or a half of one that stacks two tensors.

    Attributes:
        entry: published tensors and form; a half is an entry of its own here, plain.
        key: name of the global tensor in a checkpoint.
        global_shape: of that tensor, vocabulary rows not padded.
        offsets: where the unit begins in it.
        sizes: of the unit in it.
    """

    entry: Entry
    key: str
    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def parameter_shape(self) -> tuple[int, ...]:
        """Shape without the dimension of the layers."""
        return self.sizes[-min(2, len(self.entry.hf_shapes[0])) :]

    @property
    def num_values(self) -> int:
        """Number of values in the unit."""
        return math.prod(self.sizes)


def units(config: HFConfig) -> tuple[Unit, ...]:
    """Return all units of a model, in the order of computation."""
    return tuple(unit for entry in entries(config) for unit in _units_of(entry, config))


def _units_of(entry: Entry, config: HFConfig) -> Iterator[Unit]:
    key = entry.name
    first: tuple[int, ...] = ()
    num_layers: tuple[int, ...] = ()
    found = _LAYER.fullmatch(entry.name)
    if found:
        tower, number, rest = found.groups()
        key = f"{tower}.decoder.layers.{_FUSED.get(rest, rest)}"
        first = (int(number),)
        num_layers = (config.vision.depth if tower == "vision_model" else config.text.num_layers,)
    columns = entry.hf_shapes[0][1:]
    if entry.form == "flat":
        columns = (math.prod(columns),)
    parts = [entry]
    if entry.form == "stacked":
        pairs = zip(entry.hf_names, entry.hf_shapes, strict=True)
        parts = [replace(entry, hf_names=(n,), hf_shapes=(s,), form="plain") for n, s in pairs]
    rows = [sum(shape[0] for shape in part.hf_shapes) for part in parts]
    for number, part in enumerate(parts):
        yield Unit(
            entry=part,
            key=key,
            global_shape=(*num_layers, sum(rows), *columns),
            offsets=(*first, sum(rows[:number]), *(0 for _ in columns)),
            sizes=(*(1 for _ in first), rows[number], *columns),
        )


@dataclass(frozen=True)
class Published:
    """The published side of a conversion: a directory, or the headers that a checkpoint carries.

    Attributes:
        source: its tensors.
        config: shape of the model.
        units: all that there is to move.
    """

    source: HFSource
    config: HFConfig
    units: tuple[Unit, ...]

    @classmethod
    def open(cls, directory: Path) -> Published:
        """Read headers and configuration; raise `CheckpointError` if they do not agree."""
        config, source = read_hf_config(directory), HFSource(directory)
        check_tensors(source, config)
        return cls(source, config, units(config))

    @property
    def dtype(self) -> torch.dtype:
        """Type of all tensors; float32 holds a mixture without loss."""
        types = {tensor.dtype for tensor in self.source.tensors.values()}
        return types.pop() if len(types) == 1 else torch.float32

    def tensors(self, unit: Unit, parameter: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the published tensors of a unit's parameter, a tied copy included."""
        return with_tied_copy(publish(unit.entry, [parameter]), self.source, self.config)
