"""The ranks of tools/layouts.py: one batch under many layouts, compared with one process.

Started by torchrun as `layout_table.py DIRECTORY LAYOUTS`, JSON of name -> keys of `parallel`. A
world of one writes the expected numbers to the directory, a larger one reads them and prints its
gaps. Groups are made anew for each layout.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from PIL import Image
from safetensors.torch import load_file, save_file

from megatron_sr1.config.loading import load_config
from megatron_sr1.config.rollout import RolloutConfig
from megatron_sr1.config.run import Config
from megatron_sr1.config.training import AlgorithmConfig
from megatron_sr1.data.processor import Processor
from megatron_sr1.gpu_checks.numerics import published_gradients
from megatron_sr1.records import PackedBatch, TrainSample
from megatron_sr1.runtime import cpu
from megatron_sr1.runtime.device import select_device, start_distributed
from megatron_sr1.runtime.groups import Groups, gather_objects, make_groups
from megatron_sr1.trainer.actor import Actor, load_actor_model, make_actor
from megatron_sr1.trainer.objective import grpo_loss
from megatron_sr1.trainer.step import update
from tests.layouts import destroy_groups, exported, pack_rows, random_samples

NUM_UPDATES, LEARNING_RATE, TEMPERATURE = 2, 1e-3, 0.7
EPSILON = 1e-4
"""Of AdamW: a gradient far below it is not blown up to a whole step."""
MEASURES = ("gradient", "sgd", "adamw")
IMAGES = ((), ((84, 28),), ((56, 112), (140, 84), (28, 28)), (), ((84, 84),), ())
NUM_TEXT = (12, 39, 25, 33, 8, 400)
"""Text tokens of each sample; the last is longer than all others together."""


@dataclass(frozen=True)
class Variant:
    """One way to compute the batch under a layout."""

    packing: bool = True
    recompute: str = "none"
    vision: str = "tensor"

    def __str__(self) -> str:
        """In a line."""
        packing = "packed" if self.packing else "one a row"
        return f"{packing}, recompute {self.recompute}, vision by {self.vision}"


VARIANTS = [
    Variant(*choice)
    for choice in itertools.product((True, False), ("none", "full"), ("tensor", "images"))
]


@dataclass(frozen=True)
class Gap:
    """Largest distance of a tensor from the expected one, over the expected one's norm."""

    value: float
    tensor: str


def make_batch(processor: Processor) -> tuple[list[TrainSample], list[list[Image.Image]]]:
    """Samples with random tokens and numbers, the last longer than all others together."""
    samples, pictures = random_samples(processor, IMAGES, NUM_TEXT)
    lengths = [len(sample.token_ids) for sample in samples]
    assert lengths[-1] > sum(lengths[:-1]), lengths
    return samples, pictures


def configure(model: str, keys: dict[str, Any], variant: Variant) -> Config:
    """A configuration of a layout; it has no clipping, which would hide a gradient's scale."""
    fixed = ["model.dtype=float32", "optimizer.clip_grad=0", "optimizer.weight_decay=0"]
    fixed += [f"optimizer.learning_rate={LEARNING_RATE}", f"optimizer.epsilon={EPSILON}"]
    own = [f"parallel.{key}={json.dumps(value)}" for key, value in keys.items()]
    own += [f"model.recompute={variant.recompute}", f"parallel.vision={variant.vision}"]
    return load_config(None, [f"model.path={model}", *fixed, *own])


def make_rows(
    config: Config, groups: Groups, processor: Processor, packing: bool
) -> list[PackedBatch]:
    """This rank's samples in packed rows, or each in a row of its own."""
    samples, pictures = make_batch(processor)
    return pack_rows(samples, pictures, processor, groups, 4096 if packing else 1)


def with_sgd(actor: Actor) -> Actor:
    """The actor with plain gradient descent, which hides nothing of a gradient's size."""
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    settings = OptimizerConfig(optimizer="sgd", lr=LEARNING_RATE, weight_decay=0.0,
                               sgd_momentum=0.0, clip_grad=0.0, bf16=False,
                               params_dtype=torch.float32)  # fmt: skip
    with cpu.megatron_mode():
        return replace(actor, optimizer=get_megatron_optimizer(settings, actor.wrapped))


def run(
    model: str, keys: dict[str, Any], variant: Variant, processor: Processor
) -> tuple[list[float], dict[str, dict[str, torch.Tensor]]]:
    """Losses of both optimizers' updates, and gradients and weights by measure."""
    config = configure(model, keys, variant)
    destroy_groups()
    groups = make_groups(config.parallel, select_device("cpu"))
    rows = make_rows(config, groups, processor, variant.packing)
    loss = grpo_loss(AlgorithmConfig(kl_coefficient=0.1), RolloutConfig(max_response_tokens=64))
    losses, found = [], {}
    for name in ("sgd", "adamw"):
        config.parallel.distributed_optimizer = name == "adamw"
        actor = make_actor(config, *load_actor_model(config, groups), groups, NUM_UPDATES)
        actor = with_sgd(actor) if name == "sgd" else actor
        for number in range(NUM_UPDATES):
            losses.append(update(actor, rows, loss, TEMPERATURE)["loss"])
            if name == "sgd" and number == 0:
                found["gradient"] = published_gradients(actor.chunks, actor.hf_config, groups)
        found[name] = exported(actor.chunks, actor.hf_config, groups)
    return losses, found


def worst(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> Gap:
    """The tensor that is farthest from what is expected."""
    assert found.keys() == expected.keys()
    gaps = [
        Gap(float((found[name] - want).norm() / want.norm()), name)
        for name, want in expected.items()
    ]
    return max(gaps, key=lambda gap: gap.value if gap.value == gap.value else float("inf"))


def compare(directory: Path, layouts: dict[str, dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Gaps of each layout and variant; the largest of all ranks'."""
    model, processor = str(directory / "model"), make_processor(directory)
    wanted_losses = json.loads((directory / "losses.json").read_text())
    wanted = {name: load_file(directory / f"{name}.safetensors") for name in MEASURES}
    for layout, keys in layouts.items():
        for variant in VARIANTS:
            losses, found = run(model, keys, variant, processor)
            pairs = zip(losses, wanted_losses, strict=True)
            gaps = {"loss": Gap(max(abs(a - b) / abs(b) for a, b in pairs), "")}
            gaps |= {name: worst(found[name], wanted[name]) for name in MEASURES}
            everyone = gather_objects(gaps)
            most = {n: max((g[n] for g in everyone), key=lambda g: g.value) for n in gaps}
            record = {"layout": layout, "variant": str(variant)}
            yield record | {name: asdict(gap) for name, gap in most.items()}


def make_processor(directory: Path) -> Processor:
    """Of the model that layouts.py made."""
    return Processor(directory / "model", 784, 200704)


def main() -> None:
    """Write expected numbers, or compare with them."""
    directory, layouts = Path(sys.argv[1]), json.loads(sys.argv[2])
    torch.set_num_threads(1)
    start_distributed(select_device("cpu"), 120)
    if not layouts:
        losses, found = run(str(directory / "model"), {}, Variant(False), make_processor(directory))
        (directory / "losses.json").write_text(json.dumps(losses))
        for name, tensors in found.items():
            save_file(tensors, directory / f"{name}.safetensors")
    else:
        for record in compare(directory, layouts):
            if dist.get_rank() == 0:
                print("GAPS " + json.dumps(record), flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
