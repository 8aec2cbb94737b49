"""The actor: Megatron chunks with data parallelism, optimizer and learning-rate schedule.

In: configuration, groups, a model directory. Out: an `Actor`, which the steps train and whose
weights are exported. The frozen reference of the KL term is a copy of this rank's shard in host
memory, exchanged with the live weights for its forward pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from megatron_sr1.checkpoint.folders import ModelSource
from megatron_sr1.checkpoint.hf import export_weights, local_parameters, save_hf
from megatron_sr1.checkpoint.mapping import check_freeze, entries, is_frozen
from megatron_sr1.checkpoint.tensors import Trained
from megatron_sr1.config.run import Config
from megatron_sr1.model.hf_config import HFConfig
from megatron_sr1.runtime import cpu
from megatron_sr1.runtime.groups import Groups
from megatron_sr1.trainer.optimizer import make_optimizer, make_scheduler


@dataclass(frozen=True)
class Actor:
    """What is trained.

    Attributes:
        chunks: the model, one chunk a virtual stage.
        wrapped: the same chunks inside Megatron's DistributedDataParallel.
        optimizer: Megatron's optimizer.
        scheduler: learning-rate schedule.
        hf_config: shape of the model.
        source: the directory that it was loaded from.
        groups: the layout.
        frozen: published names of the tensors of layers that do not learn.
    """

    chunks: list[Any]
    wrapped: list[Any]
    optimizer: Any
    scheduler: Any
    hf_config: HFConfig
    source: ModelSource
    groups: Groups
    frozen: frozenset[str] = frozenset()
    _given: set[str] = field(default_factory=set, init=False, compare=False)

    def weights(self, left_out: Collection[str] = ()) -> Iterator[tuple[str, torch.Tensor]]:
        """Full weights under their published names, one at a time; collective over all ranks."""
        return export_weights(self.chunks, self.hf_config, self.groups, left_out)

    def make_room(self, what: str) -> None:
        """Free memory of the device until `take_room`.

        Args:
            what: none | gradients, which are 0 then | optimizer, its state to host memory as well;
                of that nothing happens on a CPU.
        """
        if what == "none" or self._given:
            return
        for wrapped in self.wrapped:
            wrapped.offload_grad_buffers()
        if what == "optimizer" and self.first_device.type == "cuda":
            self.optimizer.offload_to_cpu()
        self._given.add(what)

    def take_room(self) -> None:
        """Undo `make_room`, if it was done; `update` asks for it by itself."""
        if not self._given:
            return
        for wrapped in self.wrapped:
            wrapped.restore_grad_buffers()
        if "optimizer" in self._given and self.first_device.type == "cuda":
            self.optimizer.restore_from_cpu()
        self._given.clear()

    @property
    def trained(self) -> Trained:
        """What a checkpoint saves and loads."""
        return Trained(self.wrapped, self.optimizer, self.scheduler, self.groups)

    def save_hf(self, directory: Path) -> None:
        """Write the weights as the source's Hugging Face directory has them; collective."""
        save_hf(self.chunks, self.hf_config, self.groups, self.source.hf_files, directory)

    @cached_property
    def first_device(self) -> torch.device:
        """Where the weights are."""
        return next(self.chunks[0].parameters()).device


class Reference:
    """Frozen copy of a rank's shard, in host memory."""

    def __init__(self, chunks: list[Any]) -> None:
        """Copy the chunks' present weights."""
        self._parameters = [p for chunk in chunks for p in chunk.parameters()]
        self._frozen = [p.detach().to("cpu", copy=True) for p in self._parameters]

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """While inside, the chunks hold the reference's weights; afterwards their own again."""
        live = [p.detach().to("cpu", copy=True) for p in self._parameters]
        try:
            self._fill(self._frozen)
            yield
        finally:
            self._fill(live)

    @torch.no_grad()
    def _fill(self, values: list[torch.Tensor]) -> None:
        for parameter, value in zip(self._parameters, values, strict=True):
            parameter.copy_(value)


def freeze(chunks: list[Any], hf_config: HFConfig, patterns: Sequence[str]) -> frozenset[str]:
    """Take parameters out of training: no gradient, no optimizer state.

    Args:
        chunks: the model.
        hf_config: shape of the model.
        patterns: regular expressions, searched for in published names (`^visual[.]`).

    Returns:
        published names of the tensors of layers all of which is frozen.

    Raises:
        ConfigError: a pattern that matches nothing, or only a part of a fused parameter.
    """
    check_freeze(hf_config, patterns)
    for entry, parameter in local_parameters(chunks, hf_config):
        parameter.requires_grad_(not is_frozen(entry, patterns))
    learning = {n for e in entries(hf_config) if not is_frozen(e, patterns) for n in e.hf_names}
    layers = {name.rpartition(".")[0] for name in learning}
    names = {name for entry in entries(hf_config) for name in entry.hf_names}
    return frozenset(name for name in names if name.rpartition(".")[0] not in layers)


def make_actor(
    config: Config,
    chunks: list[Any],
    hf_config: HFConfig,
    source: ModelSource,
    groups: Groups,
    num_updates: int,
) -> Actor:
    """Wrap loaded chunks for training.

    Args:
        config: of the run.
        chunks: the model with its weights.
        hf_config: shape of the model.
        source: the directory that it was loaded from.
        groups: the layout.
        num_updates: optimizer updates of the whole run, for the schedule.
    """
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )

    frozen = freeze(chunks, hf_config, config.model.freeze)
    with cpu.megatron_mode():
        ddp_config = DistributedDataParallelConfig(
            grad_reduce_in_fp32=config.optimizer.gradients == "float32",
            use_distributed_optimizer=config.parallel.distributed_optimizer,
            # A non-finite gradient stops the run before the update: the rank that sees it raises
            # and the failure watch takes the others along.
            check_for_nan_in_grad=True,
        )
        wrapped = [DistributedDataParallel(c.config, ddp_config, c) for c in chunks]
        no_sync = [outer.no_sync for outer in wrapped]
        # One configuration for all chunks of a rank.
        chunks[0].config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
        chunks[0].config.finalize_model_grads_func = finalize_model_grads
        optimizer = make_optimizer(config, wrapped)
        scheduler = make_scheduler(config.optimizer, optimizer, num_updates)
    return Actor(chunks, wrapped, optimizer, scheduler, hf_config, source, groups, frozen)
