"""Layouts of the actor over ranks, those that a model allows, and the schedule of their pipeline.

With one stage per rank the schedule is 1F1B. With v stages per rank it is the interleaved schedule
of Narayanan et al. (arXiv 2104.04473, section 2.2) as implemented by
megatron/core/pipeline_parallel/schedules.py: p rows pass a rank's first stage, then its second, and
so on, before the next p rows; the backward pass visits the stages in reverse.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate

from megatron_sr1.config.run import Config, ParallelConfig
from megatron_sr1.errors import ConfigError
from megatron_sr1.model.hf_config import HFConfig, check_layout
from megatron_sr1.runtime.gpus import GPUS_PER_NODE

CONTEXT_SIZES = (1, 2, 4, 8)
"""Context-parallel sizes that are tried."""
NUM_GROUPS = 3
"""Groups of p rows after which the schedule has passed through all of its states."""


@dataclass(frozen=True)
class Layout:
    """A layout of the actor, with the size of an engine replica.

    Fields have the names and values of `ParallelConfig`; besides, `data` is the number of
    data-parallel ranks, `recompute` that of `ModelConfig`, `engine` the ranks of an engine replica.
    """

    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    data: int = 1
    sequence: bool = False
    recompute: str = "none"
    engine: int = 1
    virtual: int = 1
    stage_layers: tuple[int, ...] = ()
    vision: str = "tensor"

    @property
    def num_ranks(self) -> int:
        """World size."""
        return self.tensor * self.pipeline * self.context * self.data

    @property
    def num_sharing(self) -> int:
        """Ranks that reduce gradients together and partition the optimizer state."""
        return self.data * self.context

    @property
    def sequence_split(self) -> int:
        """Ranks that share a row's tokens outside the tensor-parallel products."""
        return self.tensor if self.sequence else 1

    @property
    def tower(self) -> int:
        """Ranks that share each layer of the tower."""
        return 1 if self.vision == "images" else self.tensor

    @property
    def images(self) -> int:
        """Ranks that share the images of a row."""
        return self.context * self.tensor // self.tower

    @property
    def splits(self) -> tuple[int, int, int]:
        """Context-parallel ranks, stages, tensor-parallel ranks: what small kernels come from."""
        return self.context, self.pipeline, self.tensor

    @property
    def ends(self) -> list[int]:
        """Pipeline ranks to examine: first and last, or all if their stages differ."""
        return list(range(self.pipeline)) if self.stage_layers else sorted({0, self.pipeline - 1})

    def stages(self, pipeline_rank: int) -> range:
        """Return the numbers of a pipeline rank's stages."""
        return range(pipeline_rank, self.pipeline * self.virtual, self.pipeline)

    def layers(self, num_layers: int) -> list[range]:
        """Return the text layers of each stage."""
        num_stages = self.pipeline * self.virtual
        counts = self.stage_layers or (num_layers // num_stages,) * num_stages
        return [range(end - own, end) for own, end in zip(counts, accumulate(counts), strict=True)]

    def overrides(self, config: Config) -> list[str]:
        """Return the overrides, `group.key=value`, that give a configuration this layout."""
        shown = {
            "parallel.tensor": self.tensor,
            "parallel.pipeline": self.pipeline,
            "parallel.context": self.context,
            "parallel.sequence": str(self.sequence).lower(),
            "model.recompute": self.recompute,
        }
        if config.stage != "sft":
            shown["rollout.tensor_parallel"] = self.engine
        for key, value in cut_keys(self).items():
            if {value} != {cut_keys(ParallelConfig())[key], cut_keys(config.parallel)[key]}:
                shown[key] = value
        return [f"{key}={value}" for key, value in shown.items()]

    def __str__(self) -> str:
        """Describe in one line."""
        parts = [f"tensor {self.tensor}{'+sp' if self.sequence else ''}, pipeline {self.pipeline}"]
        parts[0] += f" x {self.virtual}" if self.virtual > 1 else ""
        parts += [f"layers {'+'.join(map(str, self.stage_layers))}"] if self.stage_layers else []
        parts += [f"context {self.context}"] if self.context > 1 else []
        parts += [f"data {self.data}, recompute {self.recompute}"]
        parts += ["tower by images"] if self.vision == "images" else []
        return ", ".join(parts)


def cut_keys(layout: Layout | ParallelConfig) -> dict[str, str]:
    """Return the keys that split layers and tower, other than numbers of ranks."""
    return {
        "parallel.virtual": str(layout.virtual),
        "parallel.stage_layers": f"[{','.join(map(str, layout.stage_layers))}]",
        "parallel.vision": layout.vision,
    }


def configured(config: Config, num_gpus: int) -> Layout | None:
    """Return the layout of a configuration, or None if it does not divide the GPUs."""
    parallel, engine = config.parallel, config.rollout.tensor_parallel
    if num_gpus % parallel.replica_size or num_gpus % engine:
        return None
    shared = asdict(parallel) | {"stage_layers": tuple(parallel.stage_layers)}
    del shared["distributed_optimizer"]
    data, recompute = num_gpus // parallel.replica_size, config.model.recompute
    return Layout(**shared, data=data, recompute=recompute, engine=engine)


def candidates(hf_config: HFConfig, num_gpus: int, max_data: int, engine: int) -> Iterator[Layout]:
    """Yield the layouts that use all GPUs, with tensor parallelism within a node.

    `max_data` is the number of data-parallel ranks that an update has work for.
    """
    for tensor in range(1, min(GPUS_PER_NODE, num_gpus) + 1):
        for pipeline in range(1, hf_config.text.num_layers + 1):
            rest, remainder = divmod(num_gpus, tensor * pipeline)
            if remainder or not _divides(hf_config, tensor, pipeline):
                continue
            layout = Layout(tensor, pipeline, sequence=tensor > 1, engine=engine)
            for context in CONTEXT_SIZES:
                if rest % context or rest // context > max_data:
                    continue
                split = replace(layout, context=context, data=rest // context)
                for recompute in ("none", "selective", "full"):
                    yield replace(split, recompute=recompute)


def _divides(hf_config: HFConfig, tensor: int, pipeline: int) -> bool:
    try:
        check_layout(hf_config, ParallelConfig(tensor, pipeline))
    except ConfigError:
        return False
    return True


def engine_sizes(hf_config: HFConfig, num_gpus: int) -> list[int]:
    """Return the possible sizes of an engine replica: divisors of all heads, within a node."""
    heads = math.gcd(hf_config.text.num_attention_heads, hf_config.vision.num_heads, num_gpus)
    return [size for size in range(1, GPUS_PER_NODE + 1) if heads % size == 0]


def num_warmup(layout: Layout, pipeline_rank: int) -> int:
    """Return a rank's forward passes, of one row in one stage, before its first backward pass."""
    to_come = layout.pipeline - pipeline_rank - 1
    if layout.virtual == 1:
        return to_come
    return 2 * to_come + (layout.virtual - 1) * layout.pipeline


def in_flight(layout: Layout, pipeline_rank: int, stage_bytes: Sequence[float]) -> list[int]:
    """Return how many micro-batches a rank holds in each of its stages at peak memory.

    `stage_bytes` are the activations of one micro-batch in each of the rank's stages.
    """
    order = [stage for stage in range(layout.virtual) for _ in range(layout.pipeline)] * NUM_GROUPS
    warmup, last = num_warmup(layout, pipeline_rank), layout.virtual - 1
    held, worst, peak = [0] * layout.virtual, [0] * layout.virtual, -1.0
    for number, stage in enumerate(order):
        held[stage] += 1
        num_bytes = sum(n * size for n, size in zip(held, stage_bytes, strict=True))
        if num_bytes > peak:
            worst, peak = list(held), num_bytes
        if number >= warmup:
            held[last - order[number - warmup]] -= 1
    return worst


def num_slots(layout: Layout, rows: float) -> float:
    """Return the time of `rows` rows in a pipeline, in units of a micro-batch on one rank.

    Ranks are idle for p - 1 micro-batches while the pipeline fills and drains, or 1/v of that with
    v stages per rank. A last group of q < p rows takes p + (q - 1)/v, because its first row must
    return from the last rank before it enters the next stage of the first.
    """
    ranks = layout.pipeline
    before = (math.ceil(rows / ranks - 1e-9) - 1) * ranks
    return before + ranks + (rows - before - 1) / layout.virtual


def balanced_stages(
    layout: Layout, num_layers: int, first: float, layer: float, last: float
) -> tuple[int, ...]:
    """Return the layers per stage, at least one, that minimize the time of the slowest rank.

    Times are those of the first and of the last stage without their layers (the tower, the logits),
    and of a layer.
    """
    layers = [1] * (layout.pipeline * layout.virtual)
    others = [first, *[0.0] * (len(layers) - 2), last]

    def seconds(stage: int) -> float:
        return others[stage] + layers[stage] * layer

    for _ in range(num_layers - len(layers)):
        rank = min(range(layout.pipeline), key=lambda r: sum(map(seconds, layout.stages(r))))
        layers[min(layout.stages(rank), key=seconds)] += 1
    return tuple(layers)
