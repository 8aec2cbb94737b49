"""LoRA adapters of a run: their numbers, operations and the activations that they keep.

In: the settings of `adapter` and the checkpoints' name mapping. Out: counts for the whole model, by
Megatron's linear layers, which hold one or several published ones. model/adapters.py computes what
is counted here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

from megatron_sr1.checkpoint.mapping import TOWER, adapter_entries, linear_modules
from megatron_sr1.config.adapter import AdapterConfig
from megatron_sr1.model.flops import Work
from megatron_sr1.model.hf_config import HFConfig

DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
MASK_BYTES = 1
"""Bytes of a value of dropout's mask."""


@dataclass(frozen=True)
class AdaptedLinear:
    """A Megatron linear layer with adapters.

    Attributes:
        name: as in the mapping, without `.weight`.
        parts: published layers in it that have an adapter.
        columns: width of its input.
        rows: width of its output, of the published layers without an adapter too.
        adapted_rows: those of the published layers with one.
        base_numel: weights of the published layers that it consists of.
    """

    name: str
    parts: int
    columns: int
    rows: int
    adapted_rows: int
    base_numel: int

    @property
    def is_vision(self) -> bool:
        """True in the vision tower."""
        return self.name.startswith(TOWER)

    @property
    def kind(self) -> str:
        """Its name within a layer, such as `linear_qkv`."""
        return self.name.rpartition(".")[2]


@lru_cache(maxsize=64)
def adapted_linears(
    hf_config: HFConfig, targets: tuple[str, ...], rank: int
) -> tuple[AdaptedLinear, ...]:
    """Return the linear layers with adapters, in the order of computation."""
    bases, found = linear_modules(hf_config), dict[str, list[int]]()
    for module, (_, b) in adapter_entries(hf_config, targets, rank).items():
        found.setdefault(bases[module].name, []).append(b.hf_shapes[0][0])
    shapes = {entry.name: entry.hf_shapes for entry in bases.values()}
    return tuple(
        AdaptedLinear(
            name.removesuffix(".weight"),
            len(rows),
            shapes[name][0][1],
            sum(shape[0] for shape in shapes[name]),
            sum(rows),
            sum(math.prod(shape) for shape in shapes[name]),
        )
        for name, rows in found.items()
    )


@dataclass(frozen=True)
class Adapters:
    """Adapters of a run.

    Attributes:
        targets: as `adapter.targets`.
        dtype_bytes: of an adapter's parameters and products.
        model_bytes: of the model's.
        has_dropout: a mask and a copy of the input for each published layer.
    """

    hf_config: HFConfig
    rank: int
    targets: tuple[str, ...]
    dtype_bytes: int
    model_bytes: int
    has_dropout: bool = False

    @cached_property
    def linears(self) -> tuple[AdaptedLinear, ...]:
        """The linear layers that have adapters."""
        return adapted_linears(self.hf_config, self.targets, self.rank)

    @property
    def is_in_tower(self) -> bool:
        """True if the vision tower has adapters."""
        return any(linear.is_vision for linear in self.linears)

    @property
    def numel(self) -> int:
        """Parameters of all adapters, without padding and repetition."""
        return sum(map(self._numel, self.linears))

    @property
    def tower_numel(self) -> int:
        """Those in the vision tower."""
        return sum(self._numel(linear) for linear in self.linears if linear.is_vision)

    @property
    def merged_numel(self) -> int:
        """Weights that change when adapters are merged into them: what a sync sends."""
        return sum(linear.base_numel for linear in self.linears)

    def work(self, is_vision: bool, tokens: float) -> Work:
        """Return the operations of a forward pass of the language model's or the tower's adapters.

        `tokens` are patches in the tower, of which the merger's layers have fewer rows. As each
        fused layer is one product, a B has as many columns as all parts together.
        """
        merged = self.hf_config.vision.spatial_merge_size**2
        total = 0.0
        for linear in (each for each in self.linears if each.is_vision == is_vision):
            rows = tokens / merged if ".merger." in linear.name else tokens
            total += 2 * rows * linear.parts * self.rank * (linear.columns + linear.rows)
        return Work(dense=total) if self.dtype_bytes == self.model_bytes else Work(float32=total)

    def kept(self, is_vision: bool, kind: str, is_counted: bool = False) -> tuple[float, float]:
        """Return what a linear layer's adapters keep: values of its input, and of A's result.

        Both in bytes per token, as the mean over the layers; the first is split like the layer's
        input. `is_counted`: the input is kept by another operation too, in the model's type.
        """
        linears, depth = self._like(is_vision, kind)
        inputs = inner = 0.0
        is_same = is_counted and self.dtype_bytes == self.model_bytes
        for linear in linears:
            if self.has_dropout:
                inputs += linear.parts * linear.columns * (self.dtype_bytes + MASK_BYTES)
            elif not is_same:
                inputs += linear.columns * self.dtype_bytes
            inner += linear.parts * self.rank * self.dtype_bytes
        return inputs / depth, inner / depth

    @property
    def kept_by_merger(self) -> float:
        """Bytes per patch that the adapters of the tower's merger keep."""
        linears = [linear for linear in self.linears if ".merger." in linear.name]
        values = sum(linear.columns + linear.parts * self.rank for linear in linears)
        return values * self.dtype_bytes / self.hf_config.vision.spatial_merge_size**2

    def matrices(self, is_vision: bool, *kinds: str) -> float:
        """Return the bytes of joined A's and B's, which a layer keeps whatever its tokens."""
        total = 0.0
        for kind in kinds:
            linears, depth = self._like(is_vision, kind)
            for linear in linears:
                joined = linear.columns if linear.parts > 1 and not self.has_dropout else 0
                total += linear.parts * self.rank * (joined + linear.rows) / depth
        return total * self.dtype_bytes

    def _numel(self, linear: AdaptedLinear) -> int:
        return self.rank * (linear.parts * linear.columns + linear.adapted_rows)

    def _like(self, is_vision: bool, kind: str) -> tuple[list[AdaptedLinear], int]:
        """The adapted layers of a kind in the language model or the tower, and its depth."""
        config = self.hf_config
        found = [
            linear
            for linear in self.linears
            if (linear.is_vision, linear.kind) == (is_vision, kind)
            and ".merger." not in linear.name
        ]
        return found, config.vision.depth if is_vision else config.text.num_layers


def planned_adapters(
    hf_config: HFConfig, settings: AdapterConfig, model_dtype: str
) -> Adapters | None:
    """Return the adapters of a run; None if `adapter.rank` is 0."""
    if settings.rank == 0:
        return None
    model_bytes = DTYPE_BYTES[model_dtype]
    own_bytes = 4 if settings.dtype == "float32" else model_bytes
    targets = tuple(settings.targets)
    return Adapters(hf_config, settings.rank, targets, own_bytes, model_bytes, settings.dropout > 0)
