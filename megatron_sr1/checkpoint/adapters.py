"""Adapters on a loaded model: attach them, fill them, and gather them under published names.

An adapter's tensors are called as in PEFT's files but for their prefix:
`model.layers.0.self_attn.q_proj.lora_A.weight` [rank, in] and `….lora_B.weight` [out, rank].
model/adapters.py computes with them; `export_weights` merges them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from megatron_sr1.checkpoint.hf import NUM_NAMED, Gather, adapters_of, named_parameters
from megatron_sr1.checkpoint.mapping import (
    ADAPTER_A,
    ROW,
    WHOLE,
    Entry,
    adapter_entries,
    linear_modules,
)
from megatron_sr1.checkpoint.tensors import sharing, unwrap
from megatron_sr1.checkpoint.transforms import join, slices
from megatron_sr1.config.adapter import AdapterConfig
from megatron_sr1.errors import CheckpointError
from megatron_sr1.model.adapters import AdaptedOutput, Adapters, LowRank
from megatron_sr1.model.hf_config import HFConfig
from megatron_sr1.runtime.groups import Groups


def attach_adapters(
    chunks: Sequence[Any], hf_config: HFConfig, groups: Groups, settings: AdapterConfig, seed: int
) -> None:
    """Freeze a loaded model and give its linear layers new adapters, which alone are trained.

    A is random, the same under any layout, B zero. `settings.rank` is above 0. Raises `ConfigError`
    if an expression of `settings.targets` matches no layer.
    """
    modules = adapter_entries(hf_config, settings.targets, settings.rank)
    adapters = Adapters(modules, settings.scale)
    for chunk in chunks:
        unwrap(chunk).adapters = adapters
    bases = {entry.name: entry for entry in linear_modules(hf_config).values()}
    for linear, name, parameter in list(named_parameters(chunks)):
        parameter.requires_grad_(False)
        base = bases.get(name)
        names = [n.removesuffix(".weight") for n in base.hf_names] if base else []
        if base is not None and any(each in modules for each in names):
            _attach(linear, base, adapters, groups, settings)
    for entry, parameter in local_adapters(chunks):
        _fill(entry, parameter, initial_value(entry, settings, seed), groups)


def _attach(
    linear: Any, base: Entry, adapters: Adapters, groups: Groups, settings: AdapterConfig
) -> None:
    """Add the adapters of the published layers that a Megatron layer consists of."""
    group, parts = sharing(base, groups), list[LowRank | int]()
    is_sequence = linear.config.sequence_parallel
    for name, shape in zip(base.hf_names, base.hf_shapes, strict=True):
        rows = shape[0] if base.shard_dim == ROW else shape[0] // group.size
        module = name.removesuffix(".weight")
        if module not in adapters.modules:
            parts.append(rows)
            continue
        columns = linear.weight.shape[1]
        dtype = torch.float32 if settings.dtype == "float32" else linear.weight.dtype
        make = partial(torch.empty, dtype=dtype, device=linear.weight.device)
        pair = adapters.modules[module]
        part = LowRank(make(settings.rank, columns), make(rows, settings.rank), pair)
        for entry, parameter in zip(pair, part.parameters(), strict=True):
            _mark(parameter, entry, group.size < groups.tensor.size, is_sequence)
        linear.add_module(module.rpartition(".")[2], part)
        parts.append(part)
    hook = AdaptedOutput(
        adapters,
        parts,
        partial(join, base, size=group.size) if len(parts) > 1 else _only,
        settings.dropout,
        is_row=base.shard_dim == ROW,
        group=group,
        sequence_parallel=is_sequence,
    )
    linear.register_forward_hook(hook)


def _only(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    return rows[0]


def _mark(parameter: Any, entry: Entry, by_images: bool, is_sequence: bool) -> None:
    """Tell Megatron how a parameter is split, and which ranks have a part of its gradient."""
    is_split = entry.shard_dim is not WHOLE
    parameter.tensor_model_parallel = is_split and not by_images
    parameter.partition_dim = entry.shard_dim if is_split else -1
    parameter.partition_stride = 1
    parameter.sequence_parallel = is_sequence and not is_split
    if by_images:  # as all of such a tower, model/vision.py
        parameter.average_gradients_across_tp_domain = True


def local_adapters(chunks: Sequence[Any]) -> Iterator[tuple[Entry, torch.nn.Parameter]]:
    """Yield this rank's A's and B's, each with its entry, in the chunks' order."""
    for chunk in chunks:
        for part in chunk.modules():
            if isinstance(part, LowRank):
                yield from zip(part.entries, (part.lora_A, part.lora_B), strict=True)


def initial_value(entry: Entry, settings: AdapterConfig, seed: int) -> torch.Tensor:
    """Return a new A as PEFT draws it, whole and float32, by seed and name alone, or B of zeros."""
    mark = hashlib.blake2b(f"{seed}/{entry.hf_names[0]}".encode(), digest_size=8)
    generator = torch.Generator().manual_seed(int.from_bytes(mark.digest(), "big") >> 1)
    a = torch.zeros(entry.hf_shapes[0])
    if not entry.name.endswith(ADAPTER_A):
        return a
    if settings.init == "gaussian":
        return a.normal_(0, 1 / settings.rank, generator=generator)
    bound = 1 / math.sqrt(a.shape[1])  # of kaiming_uniform_(a=sqrt(5))
    return a.uniform_(-bound, bound, generator=generator)


def _fill(entry: Entry, parameter: torch.Tensor, value: torch.Tensor, groups: Groups) -> None:
    """Copy this rank's share of a whole tensor into a parameter."""
    group = sharing(entry, groups)
    wanted = slices(entry, group.rank, group.size, parameter.shape[0])
    with torch.no_grad():
        parameter.copy_(join(entry, [value[place] for _, place in wanted], group.size))


def load_adapter_tensors(
    chunks: Sequence[Any], groups: Groups, tensors: Mapping[str, torch.Tensor]
) -> None:
    """Fill attached adapters from whole tensors under published names, the same on all ranks.

    Raises `CheckpointError` if tensors are missing, unexpected or of the wrong shape.
    """
    adapters = adapters_of(chunks)
    assert adapters is not None, "attach adapters first"
    wanted = {e.hf_names[0]: e.hf_shapes[0] for pair in adapters.modules.values() for e in pair}
    problems = {
        "missing": [name for name in wanted if name not in tensors],
        "unexpected": [name for name in tensors if name not in wanted],
        "misshapen": [
            f"{name} {list(tensors[name].shape)} in place of {list(shape)}"
            for name, shape in wanted.items()
            if name in tensors and tuple(tensors[name].shape) != shape
        ],
    }
    said = [
        f"{len(names)} {what}: {', '.join(names[:NUM_NAMED])}"
        for what, names in problems.items()
        if names
    ]
    if said:
        raise CheckpointError(
            f"the adapter's tensors are not those of adapter.rank and adapter.targets; "
            f"{'; '.join(said)}"
        )
    for entry, parameter in local_adapters(chunks):
        _fill(entry, parameter, tensors[entry.hf_names[0]], groups)


def export_adapters(
    chunks: Sequence[Any], groups: Groups, gather: Gather | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield A and B of each adapter, whole, under published names, on every rank; collective."""
    adapters, gather = adapters_of(chunks), gather or Gather(chunks, groups)
    assert adapters is not None, "the model has no adapters"
    for pair in adapters.modules.values():
        for entry in pair:
            yield from gather(entry)
