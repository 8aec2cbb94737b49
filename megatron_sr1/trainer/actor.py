"""The actor: Megatron chunks with data parallelism, optimizer and learning-rate schedule.

In: configuration, groups, a model directory. Out: an `Actor`, which the steps train and whose
weights are exported. The frozen reference of the KL term is the base model without its adapters, or
else a copy of this rank's shard in host memory, which takes the place of the live weights for its
forward pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from megatron_sr1.checkpoint.adapters import (
    attach_adapters,
    export_adapters,
    load_adapter_tensors,
)
from megatron_sr1.checkpoint.folders import HF_FILES, ModelSource, resolve_model
from megatron_sr1.checkpoint.hf import (
    Gather,
    adapters_of,
    export_weights,
    local_parameters,
    save_hf,
)
from megatron_sr1.checkpoint.hf_files import HFSource
from megatron_sr1.checkpoint.loading import load_model
from megatron_sr1.checkpoint.mapping import Entry, adapter_entries, check_freeze, entries, is_frozen
from megatron_sr1.checkpoint.peft_files import PeftAdapter, write_adapter
from megatron_sr1.checkpoint.tensors import Trained
from megatron_sr1.config.adapter import AdapterConfig
from megatron_sr1.config.run import Config
from megatron_sr1.model.hf_config import HFConfig, read_hf_config
from megatron_sr1.model.qwen25_vl import build_model
from megatron_sr1.model.transformer_config import row_multiple
from megatron_sr1.runtime import cpu
from megatron_sr1.runtime.groups import Groups
from megatron_sr1.runtime.host_memory import HostWeights, host_copies
from megatron_sr1.trainer.optimizer import make_optimizer, make_scheduler


@dataclass(frozen=True)
class Actor:
    """The model in training.

    Attributes:
        chunks: the model, one chunk per virtual stage.
        wrapped: the same chunks inside Megatron's DistributedDataParallel.
        source: the directory that the model was loaded from.
        row_multiple: number of tokens that each packed row is a multiple of.
        frozen: published names of the tensors of layers that training leaves as they are.
        untrained: all parameters that are not trained.
    """

    chunks: list[Any]
    wrapped: list[Any]
    optimizer: Any
    scheduler: Any
    hf_config: HFConfig
    source: ModelSource
    groups: Groups
    row_multiple: int
    frozen: frozenset[str] = frozenset()
    untrained: HostWeights = field(default_factory=lambda: HostWeights([], torch.device("cpu")))
    _offloaded: set[str] = field(default_factory=set, init=False, compare=False)

    def weights(self, left_out: Collection[str] = ()) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield full weights under their published names; collective over all ranks."""
        return export_weights(self.chunks, self.hf_config, self.groups, left_out, self._gather)

    def adapter_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield A and B of each adapter, whole, under published names; collective over all ranks.

        Names are such as `model.layers.0.self_attn.q_proj.lora_A.weight` [rank, in] and
        `….lora_B.weight` [out, rank].
        """
        return export_adapters(self.chunks, self.groups, self._gather)

    @cached_property
    def _gather(self) -> Gather:
        return Gather(self.chunks, self.groups)

    def offload(self, what: str) -> None:
        """Free device memory until `restore`.

        Args:
            what: none | gradients, which must not be needed any more | optimizer, which also moves
                the optimizer's state to host memory, unless it is there, as on a CPU | weights,
                which also drops those that are not trained: host memory has a copy, which
                `weights` reads.
        """
        parts = {"none": "", "optimizer": "gradients optimizer", "weights": "gradients weights"}
        new = set(parts.get(what, what).split()) - self._offloaded
        if "gradients" in new:
            for wrapped in self.wrapped:
                wrapped.offload_grad_buffers()
        if "optimizer" in new and self.groups.device.type == "cuda":
            self.optimizer.offload_to_cpu()
        if "weights" in new:
            self.untrained.offload()
        self._offloaded.update(new)

    def restore(self) -> None:
        """Undo `offload`, if it was called; `update` does so by itself."""
        self.restore_weights()
        if not self._offloaded:
            return
        for wrapped in self.wrapped:
            wrapped.restore_grad_buffers()
        if "optimizer" in self._offloaded and self.groups.device.type == "cuda":
            self.optimizer.restore_from_cpu()
        self._offloaded.clear()

    def restore_weights(self) -> None:
        """Undo `offload` as far as a forward pass needs it."""
        if "weights" in self._offloaded:
            self.untrained.restore()
            self._offloaded.remove("weights")

    @property
    def can_compute(self) -> bool:
        """False after `offload("weights")`, until they are back."""
        return "weights" not in self._offloaded

    @property
    def trained(self) -> Trained:
        """What a checkpoint saves and loads."""
        return Trained(self.wrapped, self.optimizer, self.scheduler, self.groups)

    def save_hf(self, directory: Path) -> None:
        """Write the weights as a Hugging Face directory like the source's; collective."""
        save_hf(self.chunks, self.hf_config, self.groups, self.source.hf_files, directory)

    def save_adapter(self, directory: Path, settings: AdapterConfig, base: str) -> None:
        """Write the adapters in PEFT's format, for the base model of that name; collective."""
        tensors = self.adapter_tensors()
        if self.groups.world.rank == 0:
            write_adapter(directory, settings, tensors, base)
        else:
            for _ in tensors:
                pass
        torch.distributed.barrier(group=self.groups.world.process_group)


class Reference:
    """The model before training: a frozen copy of a rank's shard, or the base without adapters."""

    def __init__(self, chunks: list[Any]) -> None:
        """Copy the chunks' present weights to host memory, unless they have adapters."""
        self._adapters = adapters_of(chunks)
        copied = [] if self._adapters else chunks
        self._parameters = [p for chunk in copied for p in chunk.parameters()]
        self._frozen = host_copies(self._parameters)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Give the chunks the reference's weights for the duration of a block.

        The live weights stay where they are, and are not copied. On a CPU the chunks use the
        reference's own memory, on a GPU a copy, which takes as much memory as the live weights.
        With adapters nothing is copied: they are switched off.
        """
        live = [parameter.data for parameter in self._parameters]
        adapters = self._adapters
        try:
            for parameter, frozen in zip(self._parameters, self._frozen, strict=True):
                parameter.data = frozen.to(parameter.device, non_blocking=True)
            with adapters.switched_off() if adapters else contextlib.nullcontext():
                yield
        finally:
            for parameter, weights in zip(self._parameters, live, strict=True):
                parameter.data = weights


def add_adapters(config: Config, chunks: list[Any], hf_config: HFConfig, groups: Groups) -> None:
    """Give a loaded model the adapters of `config.adapter`, if its rank is not 0."""
    chosen = config.adapter
    if not chosen.rank:
        return
    attach_adapters(chunks, hf_config, groups, chosen, config.seed)
    if chosen.path:
        given = PeftAdapter(chosen.path)
        given.check(chosen, adapter_entries(hf_config, chosen.targets, chosen.rank))
        load_adapter_tensors(chunks, groups, dict(given.tensors()))


def load_actor_model(config: Config, groups: Groups) -> tuple[list[Any], HFConfig, ModelSource]:
    """Load `model.path` under the groups' layout; return its chunks, its shape and its source."""
    source = _with_chat_template(resolve_model(*config.model.at), config, groups)
    hf_config = read_hf_config(source.hf_files)
    with cpu.megatron_mode():
        chunks = build_model(hf_config, groups, config.model, config.parallel)
        load_model(chunks, source, hf_config, groups, config.checkpoint.verify)
    return chunks, hf_config, source


def _with_chat_template(source: ModelSource, config: Config, groups: Groups) -> ModelSource:
    """Return a source whose files, which saves and exports copy, have `data.chat_template`.

    The run directory gets a copy of them; collective over all ranks.
    """
    if not config.data.chat_template:
        return source
    target = Path(config.output) / HF_FILES
    if groups.world.rank == 0:
        template = Path(config.data.chat_template)
        HFSource(source.hf_files).copy_with_chat_template(template, target)
    torch.distributed.barrier(group=groups.world.process_group)
    return replace(source, hf_files=target)


def freeze(chunks: list[Any], hf_config: HFConfig, patterns: Sequence[str]) -> frozenset[str]:
    """Exclude parameters from training: no gradient, no optimizer state.

    `patterns` are regular expressions, searched for in published names (`^visual[.]`). Of a model
    with adapters all parameters are excluded already.

    Returns:
        published names of the tensors of all layers that are frozen as a whole; with adapters, of
        those that have none, where layers that are fused have one if any of them has.

    Raises:
        ConfigError: a pattern matches nothing, or only a part of a fused parameter.
    """
    check_freeze(hf_config, patterns)
    adapters, table = adapters_of(chunks), entries(hf_config)

    def is_kept(entry: Entry) -> bool:
        if adapters is None:
            return is_frozen(entry, patterns)
        return not any(name.removesuffix(".weight") in adapters.modules for name in entry.hf_names)

    if adapters is None:
        for entry, parameter in local_parameters(chunks, hf_config):
            parameter.requires_grad_(not is_kept(entry))
    learning = {name for entry in table if not is_kept(entry) for name in entry.hf_names}
    layers = {name.rpartition(".")[0] for name in learning}
    names = {name for entry in table for name in entry.hf_names}
    return frozenset(name for name in names if name.rpartition(".")[0] not in layers)


def make_actor(
    config: Config,
    chunks: list[Any],
    hf_config: HFConfig,
    source: ModelSource,
    groups: Groups,
    num_updates: int,
) -> Actor:
    """Wrap a loaded model for training; the schedule spans `num_updates` optimizer updates."""
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )

    def finalize(model: list[Any], num_tokens: torch.Tensor, **more: Any) -> None:
        # Context-parallel ranks have the same rows and losses: one of them counts.
        counted = num_tokens if groups.counts_tokens else torch.zeros_like(num_tokens)
        finalize_model_grads(model, counted, **more)

    frozen = freeze(chunks, hf_config, config.model.freeze)
    with cpu.megatron_mode():
        ddp_config = DistributedDataParallelConfig(
            grad_reduce_in_fp32=config.optimizer.gradients == "float32",
            use_distributed_optimizer=config.parallel.distributed_optimizer,
            # A non-finite gradient stops the run before the update: the rank that sees it raises,
            # and the failure watch stops the others.
            check_for_nan_in_grad=True,
        )
        wrapped = [DistributedDataParallel(c.config, ddp_config, c) for c in chunks]
        no_sync = [outer.no_sync for outer in wrapped]
        # All chunks of a rank share one configuration.
        chunks[0].config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
        chunks[0].config.finalize_model_grads_func = finalize
        optimizer = make_optimizer(config, wrapped)
        scheduler = make_scheduler(config.optimizer, optimizer, num_updates)
    multiple = row_multiple(config.model, config.parallel)
    kept = [p for chunk in chunks for p in chunk.parameters() if not p.requires_grad]
    return Actor(
        *(chunks, wrapped, optimizer, scheduler, hf_config, source, groups, multiple, frozen),
        untrained=HostWeights(kept, groups.device),
    )
