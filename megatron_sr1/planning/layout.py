"""A layout of the actor over ranks, and the layouts that a model allows.

In: a model's shape and a number of GPUs. Out: `Layout`s that pass the model's own checks
(model/hf_config.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate

from megatron_sr1.config.model import ParallelConfig
from megatron_sr1.config.run import Config
from megatron_sr1.errors import ConfigError
from megatron_sr1.model.hf_config import HFConfig, check_layout
from megatron_sr1.runtime.gpus import GPUS_PER_NODE

CONTEXT_SIZES = (1, 2, 4, 8)
"""Context-parallel sizes that are tried."""


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
    def data_spans_nodes(self) -> bool:
        """True if gradients cross the network; ranks are ordered tensor, context, data."""
        return self.tensor * self.context * self.data > GPUS_PER_NODE

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
        parts = [f"tensor {self.tensor}{'+sp' if self.sequence else ''}"]
        parts += [f"pipeline {self.pipeline}{f' x {self.virtual}' if self.virtual > 1 else ''}"]
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
    return Layout(
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        context=parallel.context,
        data=num_gpus // parallel.replica_size,
        sequence=parallel.sequence,
        recompute=config.model.recompute,
        engine=engine,
        virtual=parallel.virtual,
        stage_layers=tuple(parallel.stage_layers),
        vision=parallel.vision,
    )


def check(hf_config: HFConfig, layout: Layout) -> None:
    """Raise a ConfigError if the layout does not divide the model."""
    check_layout(
        hf_config,
        tensor=layout.tensor,
        tower=layout.tower,
        pipeline=layout.pipeline,
        virtual_stages=layout.virtual,
        stage_layers=layout.stage_layers,
    )


def candidates(hf_config: HFConfig, num_gpus: int, max_data: int) -> Iterator[Layout]:
    """Yield the layouts that use all GPUs, with tensor parallelism within a node.

    Args:
        hf_config: shape of the model.
        num_gpus: GPUs.
        max_data: data-parallel ranks that an update has work for.
    """
    for tensor in range(1, min(GPUS_PER_NODE, num_gpus) + 1):
        for pipeline in range(1, hf_config.text.num_layers + 1):
            rest, remainder = divmod(num_gpus, tensor * pipeline)
            layout = Layout(tensor, pipeline, sequence=tensor > 1)
            if remainder or not _divides(hf_config, layout):
                continue
            for context in CONTEXT_SIZES:
                if rest % context or rest // context > max_data:
                    continue
                split = replace(layout, context=context, data=rest // context)
                for recompute in ("none", "selective", "full"):
                    yield replace(split, recompute=recompute)


def engine_sizes(hf_config: HFConfig, num_gpus: int) -> list[int]:
    """Return the possible sizes of an engine replica: divisors of all heads, within a node."""
    heads = hf_config.text.num_attention_heads, hf_config.vision.num_heads
    return [
        size
        for size in range(1, min(GPUS_PER_NODE, num_gpus) + 1)
        if num_gpus % size == 0 and not any(h % size for h in heads)
    ]


def _divides(hf_config: HFConfig, layout: Layout) -> bool:
    try:
        check(hf_config, layout)
    except ConfigError:
        return False
    return True
