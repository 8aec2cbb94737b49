"""Adapters of a run's checkpoint: exported in PEFT's format, or merged into published weights.

A checkpoint of a run with adapters holds these alone, with the path and the fingerprint of the base
in its state. Both ways take one tensor at a time, make no model and do not import Megatron.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_sr1.checkpoint.disk import check_space, listed
from megatron_sr1.checkpoint.folders import (
    ADAPTER,
    FINGERPRINT,
    HF_FILES,
    STATE,
    ModelSource,
    fingerprint,
    latest_step,
    read_state,
    resolve_model,
)
from megatron_sr1.checkpoint.hf import check_tensors
from megatron_sr1.checkpoint.hf_files import HFSource, check_target, write_like
from megatron_sr1.checkpoint.loading import verify_folder, verify_source
from megatron_sr1.checkpoint.mapping import Entry, adapter_entries
from megatron_sr1.checkpoint.peft_files import A, B, write_adapter
from megatron_sr1.checkpoint.transforms import merged, publish
from megatron_sr1.config.adapter import AdapterConfig
from megatron_sr1.config.fields import check_setting, settings
from megatron_sr1.conversion.units import Published, Unit, UnitReader
from megatron_sr1.errors import CheckpointError, ConfigError
from megatron_sr1.model.hf_config import read_hf_config
from megatron_sr1.runtime.groups import single_process

Read = Callable[[str], torch.Tensor]
Report = Callable[[str, int, int], None]


class StoredAdapter:
    """The adapters in a checkpoint.

    Attributes:
        folder: its `step_N` directory.
        settings: rank, alpha, scaling and targets.
        modules: published names of the modules that have an adapter.
        base: path or hub name of the model that they were trained on.
    """

    def __init__(self, directory: Path) -> None:
        """Find the latest checkpoint of a directory, or take a `step_N`; read no values.

        Raises `CheckpointError` if it has no adapters, or is damaged or of another model.
        """
        step = latest_step(directory) if directory.is_dir() else None
        self.folder = directory if step is None else directory / f"step_{step}"
        if not (self.folder / STATE).is_file():
            raise CheckpointError(f"{directory}: no checkpoint of a run ({STATE}) there")
        state = read_state(self.folder)["state"]
        facts = state.get(ADAPTER)
        if not isinstance(facts, dict):
            raise CheckpointError(
                f"{self.folder} is of a run without adapters; leave out --adapter to convert it"
            )
        self.settings = _settings_of(self.folder / STATE, facts)
        self.base, self._mark = str(state.get("model.path")), state.get(FINGERPRINT)
        shape = read_hf_config(self.folder / HF_FILES)
        pairs = adapter_entries(shape, self.settings.targets, self.settings.rank)
        self.modules = list(pairs)
        self._units = {e.hf_names[0]: _unit(e) for pair in pairs.values() for e in pair}
        self._reader = UnitReader(self.folder, list(self._units.values()))

    def read(self, name: str) -> torch.Tensor:
        """Read A or B of a module by its published name."""
        unit = self._units[name]
        ((_, tensor),) = publish(unit.entry, [self._reader.read(unit)])
        return tensor

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield A and B of each module under their published names."""
        for name in self._units:
            yield name, self.read(name)

    def resolve_base(self, given: str) -> ModelSource:
        """Find the base model, at `given` or where the run had it; refuse another one."""
        found = resolve_model(given or self.base)
        if fingerprint(found) != self._mark:
            raise CheckpointError(
                f"{found.weights} is not the model that the adapters in {self.folder} were trained "
                f"on, {self.base} (their weights' fingerprints differ); give that one with --base"
            )
        return found


def _settings_of(path: Path, facts: dict[str, Any]) -> AdapterConfig:
    """Return the settings that a state holds; raise `CheckpointError` if it cannot be true."""
    names = ("rank", "alpha", "scaling", "targets")
    values: dict[str, Any] = {name: facts.get(name) for name in names}
    found = AdapterConfig(**values)
    rank, targets = found.rank, found.targets
    try:
        if type(rank) is not int or not rank or type(found.alpha) not in (int, float):
            raise ConfigError(f"rank {rank!r}, alpha {found.alpha!r}")
        if not isinstance(targets, list) or not all(isinstance(each, str) for each in targets):
            raise ConfigError(f"targets {targets!r}")
        for key, each, value in settings(found, f"{ADAPTER}."):
            check_setting(key, each, value)
    except ConfigError as error:
        raise CheckpointError(f"{path}: no settings of adapters: {error}") from None
    return found


def _unit(entry: Entry) -> Unit:
    shape = entry.hf_shapes[0]
    return Unit(entry, entry.name, shape, offsets=(0, 0), sizes=shape)


def export_adapter(stored: StoredAdapter, target: Path, digests: bool) -> None:
    """Write a checkpoint's adapters in PEFT's format; with `digests`, check its files first."""
    verify_folder(stored.folder, single_process(), digests)
    write_adapter(target, stored.settings, stored.tensors(), stored.base)


def merge_checkpoint(
    stored: StoredAdapter, base: str, target: Path, digests: bool, report: Report
) -> None:
    """Write the model that a checkpoint's adapters make of their base; see `merge`."""
    found = stored.resolve_base(base)
    verify_folder(stored.folder, single_process(), digests)
    if found.kind == "megatron":
        verify_source(found, single_process(), digests)
    merge(found, stored.modules, stored.read, stored.settings.scale, target, report)


def merge(
    base: ModelSource,
    modules: Collection[str],
    read: Read,
    scale: float,
    target: Path,
    report: Report,
) -> None:
    """Write a Hugging Face directory like the base's, with an adapter merged into its weights.

    Args:
        base: the model that the adapter belongs to, of either kind.
        modules: published names of the modules that have an adapter.
        read: returns A or B of a module by its name, `….lora_A.weight`.
        scale: factor of B A.
        target: new directory, or a model's, which is replaced.
        report: called with what is being done, the bytes that are done, and all bytes.

    Raises:
        CheckpointError: the base lacks a module's weight, or the target holds something else.
    """
    source = HFSource(base.hf_files)
    check_tensors(source, read_hf_config(base.hf_files))
    check_target(source, target)
    missing = sorted(name for name in modules if f"{name}.weight" not in source.tensors)
    if missing:
        raise CheckpointError(
            f"{base.weights} has no weight of {len(missing)} modules with an adapter: "
            f"{listed(missing)}; name the model that the adapter was trained on"
        )
    total = sum(stored.num_bytes for stored in source.tensors.values())

    def weights() -> Iterator[tuple[str, torch.Tensor]]:
        done = 0
        for name, weight in _weights(base, source):
            module = name.removesuffix(".weight")
            if module in modules:
                weight = merged(weight, read(module + A), read(module + B), scale)
            yield name, weight
            done += source.tensors[name].num_bytes
            report("merging", done, total)

    target.parent.mkdir(parents=True, exist_ok=True)
    check_space(target.parent, total)
    write_like(source, target, weights())


def _weights(base: ModelSource, source: HFSource) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield a model's tensors under their published names."""
    if base.kind == "huggingface":
        yield from ((name, source.read(name)) for name in source.tensors)
        return
    published = Published(base.hf_files)
    reader = UnitReader(base.weights, published.units)
    for unit in published.units:
        yield from published.tensors(unit, reader.read(unit))
