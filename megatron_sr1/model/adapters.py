"""LoRA on Megatron's linear layers, exactly PEFT's mathematics.

To the output of a published linear layer are added `scale * B A dropout(x)`, A [rank, in], B [out,
rank] (LoRA, arXiv 2106.09685; PEFT, tuners/lora/layer.py). Megatron fuses some of them, q, k and v
or gate and up: their A's are then stacked, their B's are the blocks of one matrix in the order of
the fused rows, and each is one product.

Over tensor-parallel ranks only the `rank` numbers per token between A and B travel:

    layer     A                  between A and B                    B
    column    whole              sequence parallel: gathered; else  rows split
                                 the gradient is summed
    row       columns split      summed, or scattered under         whole
                                 sequence parallel

What is whole has the whole gradient on each rank, or under sequence parallelism that of the rank's
tokens, which Megatron sums, as for norms. A forward hook adds the result to what the layer returns,
so layers of both kinds of kernels compute, communicate and recompute as they do without.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.random import (
    get_cuda_rng_tracker,
    get_data_parallel_rng_tracker_name,
)

from megatron_sr1.model.layers import rms_norm
from megatron_sr1.runtime.groups import Group


@dataclass
class Adapters:
    """Facts about a model's adapters, one object for all chunks of a rank.

    Attributes:
        modules: published linear layer -> entries of A and B (checkpoint/mapping.py), of the whole
            model.
        scale: what their product is multiplied by.
        is_on: False while the layers compute without them.
    """

    modules: Mapping[str, tuple[Any, Any]]
    scale: float
    is_on: bool = True

    @contextlib.contextmanager
    def switched_off(self) -> Iterator[None]:
        """Compute without adapters, as the base model does, for a block."""
        self.is_on = False
        try:
            yield
        finally:
            self.is_on = True


class LowRank(torch.nn.Module):
    """This rank's share of A and B of one published linear layer."""

    def __init__(self, a: torch.Tensor, b: torch.Tensor, entries: tuple[Any, Any]) -> None:
        """Take [rank, in] and [out, rank], and their entries (checkpoint/mapping.py)."""
        super().__init__()
        self.entries = entries
        self.lora_A = torch.nn.Parameter(a)
        self.lora_B = torch.nn.Parameter(b)


class AdaptedOutput:
    """Forward hook of a Megatron linear layer: adds what its adapters compute."""

    def __init__(
        self,
        adapters: Adapters,
        parts: Sequence[LowRank | int],
        fuse: Callable[[list[torch.Tensor]], torch.Tensor],
        dropout: float,
        *,
        is_row: bool,
        group: Group,
        sequence_parallel: bool,
    ) -> None:
        """Describe the layer.

        Args:
            adapters: give scale and switch.
            parts: of each published layer in it, the adapter, or the number of this rank's rows of
                one that has none.
            fuse: joins the rows of the parts in the layer's order.
            dropout: probability, in training.
            is_row: the layer's columns are split over the ranks, not its rows.
            group: the ranks that share the layer.
            sequence_parallel: its activations outside are split by tokens over them.
        """
        self._adapters, self._parts, self._fuse = adapters, parts, fuse
        self._present = [part for part in parts if isinstance(part, LowRank)]
        self._dropout, self._is_row = dropout, is_row
        self._group, self._sequence = group, sequence_parallel and group.size > 1

    def __call__(
        self, linear: torch.nn.Module, inputs: tuple[torch.Tensor], output: tuple[Any, Any]
    ) -> tuple[Any, Any] | None:
        """Return the layer's output and bias, adapters added; None leaves them as they are."""
        if not self._adapters.is_on:
            return None
        hidden, (out, bias) = inputs[0], output
        norm: Any = getattr(linear, "layer_norm_weight", None)
        if norm is not None:  # Transformer Engine's layer begins with its norm
            eps: Any = linear.eps
            hidden = rms_norm(hidden, norm, eps)
        inner = self._between(self._down(hidden, linear.training))
        rows = self._fuse(list(self._blocks()))
        added = torch.addmm(
            out.flatten(0, -2).to(rows.dtype),
            inner.flatten(0, -2),
            rows.t(),
            alpha=self._adapters.scale,
        )
        return added.to(out.dtype).view_as(out), bias

    def _down(self, hidden: torch.Tensor, is_training: bool) -> torch.Tensor:
        """Return A x of all parts, [tokens, 1, parts * rank]."""
        weights = [part.lora_A for part in self._present]
        hidden = hidden.to(weights[0].dtype)
        if not (self._dropout and is_training):
            return F.linear(hidden, weights[0] if len(weights) == 1 else torch.cat(weights))
        # Ranks that hold the same input drop the same, others differ.
        is_same = not (self._is_row or self._sequence)
        region = (get_data_parallel_rng_tracker_name(),) if is_same else ()
        with get_cuda_rng_tracker().fork(*region):
            dropped = [F.dropout(hidden, self._dropout) for _ in weights]
        pairs = zip(dropped, weights, strict=True)
        return torch.cat([F.linear(x, weight) for x, weight in pairs], dim=-1)

    def _between(self, inner: torch.Tensor) -> torch.Tensor:
        """Communicate as the layer does, by `rank` numbers per token."""
        group = self._group.process_group
        if self._group.size == 1:
            return inner
        if self._is_row and self._sequence:
            return reduce_scatter_to_sequence_parallel_region(inner, group=group)
        if self._is_row:
            return reduce_from_tensor_model_parallel_region(inner, group=group)
        if self._sequence:
            return gather_from_sequence_parallel_region(inner, group=group)
        return copy_to_tensor_model_parallel_region(inner, group=group)

    def _blocks(self) -> Iterator[torch.Tensor]:
        """Yield each part's rows of B, in columns of its own: [rows, parts * rank]."""
        like, count = self._present[0].lora_B, len(self._present)
        rank, number = like.shape[1], 0
        for part in self._parts:
            if isinstance(part, LowRank):
                before = number * rank
                after = (count - 1) * rank - before
                yield F.pad(part.lora_B, (before, after)) if count > 1 else part.lora_B
                number += 1
            else:
                yield like.new_zeros(part, count * rank)
