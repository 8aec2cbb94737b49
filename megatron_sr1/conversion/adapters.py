"""Adapters merged into published weights, and taken out of a checkpoint, a tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import torch

from megatron_sr1.checkpoint.disk import check_space, listed
from megatron_sr1.checkpoint.hf_files import HFSource, check_target, write_like
from megatron_sr1.checkpoint.peft_files import A, B
from megatron_sr1.checkpoint.transforms import merged
from megatron_sr1.errors import CheckpointError

Read = Callable[[str], torch.Tensor]
Report = Callable[[str, int, int], None]


def merge(
    base: Path, modules: Collection[str], read: Read, scale: float, target: Path, report: Report
) -> None:
    """Write a Hugging Face directory like the base's, with an adapter merged into its weights.

    Args:
        base: Hugging Face directory that the adapter belongs to.
        modules: published names of the modules that have an adapter.
        read: returns A or B of a module by its name, `….lora_A.weight`.
        scale: factor of B A.
        target: new directory, or a model's, which is replaced.
        report: is told what is done, of how many bytes.

    Raises:
        CheckpointError: the base lacks a module's weight, or the target holds something else.
    """
    source = HFSource(base)
    source.need_weights()
    check_target(source, target)
    missing = sorted(name for name in modules if f"{name}.weight" not in source.tensors)
    if missing:
        raise CheckpointError(
            f"{base} has no weight of {len(missing)} modules with an adapter: {listed(missing)}; "
            "name the model that the adapter was trained on"
        )
    total = sum(stored.num_bytes for stored in source.tensors.values())

    def weights() -> Iterator[tuple[str, torch.Tensor]]:
        done = 0
        for name, stored in source.tensors.items():
            weight, module = source.read(name), name.removesuffix(".weight")
            if module in modules:
                weight = merged(weight, read(module + A), read(module + B), scale)
            yield name, weight
            done += stored.num_bytes
            report("merging", done, total)

    target.parent.mkdir(parents=True, exist_ok=True)
    check_space(target.parent, total)
    write_like(source, target, weights())
