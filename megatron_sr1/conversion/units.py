"""What a conversion moves at a time: some published tensors, and where they are in a checkpoint.

In: a model's configuration. Out: its units. A checkpoint of Megatron-Core holds global tensors,
whatever the layout: the layers of a decoder are one above the other along a dimension of their
own, a norm before a linear is named as Transformer Engine's fused layer names it
(megatron/core/models/gpt/gpt_layer_specs.py), and gate and up are halves of one tensor. Which
published tensors make a parameter is the table's business (mapping.py), how they do is that of
transforms.py; tests compare the places below with Megatron's own `sharded_state_dict`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatron_sr1.checkpoint.mapping import Entry, entries
from megatron_sr1.model.hf_config import HFConfig

_FUSED = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}
_LAYER = re.compile(r"((?:vision|language)_model)\.decoder\.layers\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Unit:
    """The least that can be moved: a parameter, or a half of one that two tensors are stacked in.

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
        """Numbers in the unit."""
        return math.prod(self.sizes)


def units(config: HFConfig) -> tuple[Unit, ...]:
    """All units of a model, in the order of computation."""
    return tuple(unit for entry in entries(config) for unit in _units_of(entry, config))


def _units_of(entry: Entry, config: HFConfig) -> Iterator[Unit]:
    key = entry.name
    first: tuple[int, ...] = ()
    above: tuple[int, ...] = ()
    found = _LAYER.fullmatch(entry.name)
    if found:
        tower, number, rest = found.groups()
        key = f"{tower}.decoder.layers.{_FUSED.get(rest, rest)}"
        first = (int(number),)
        above = (config.vision.depth if tower == "vision_model" else config.text.num_layers,)
    one = (1,) * len(first)
    rows, rest_shape = _parameter_shape(entry)
    begin = 0
    for part in _parts(entry):
        size, _ = _parameter_shape(part)
        yield Unit(
            entry=part,
            key=key,
            global_shape=(*above, rows, *rest_shape),
            offsets=(*first, begin, *(0 for _ in rest_shape)),
            sizes=(*one, size, *rest_shape),
        )
        begin += size


def _parts(entry: Entry) -> list[Entry]:
    if entry.form != "stacked":
        return [entry]
    pairs = zip(entry.hf_names, entry.hf_shapes, strict=True)
    return [replace(entry, hf_names=(n,), hf_shapes=(s,), form="plain") for n, s in pairs]


def _parameter_shape(entry: Entry) -> tuple[int, tuple[int, ...]]:
    """Rows of a parameter, and the other dimensions."""
    rows = sum(shape[0] for shape in entry.hf_shapes)
    rest = entry.hf_shapes[0][1:]
    return rows, (math.prod(rest),) if entry.form == "flat" else rest
