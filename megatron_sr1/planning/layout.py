"""A layout of the actor over ranks, and the layouts that a model allows.

In: a model's shape and a number of GPUs. Out: `Layout`s that pass the checks which the model
itself makes (model/layout_checks.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate

from megatron_sr1.config import Config, ParallelConfig
from megatron_sr1.errors import ConfigError
from megatron_sr1.model.hf_config import HFConfig
from megatron_sr1.model.layout_checks import check_layout
from megatron_sr1.runtime.gpus import GPUS_PER_NODE

LARGEST_CONTEXT = 8


@dataclass(frozen=True)
class Layout:
    """How the actor lies over ranks.

    Attributes:
        tensor: tensor-parallel ranks, neighbours.
        pipeline: ranks that hold the stages, in turn.
        context: context-parallel ranks.
        data: data-parallel ranks.
        sequence: sequence parallelism.
        recompute: none | selective | full.
        engine: ranks of an engine replica.
        virtual: stages of each pipeline rank.
        stage_layers: text layers of each stage; empty for equally many.
        vision: tensor | images.
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
        """Of the world."""
        return self.tensor * self.pipeline * self.context * self.data

    @property
    def num_sharing(self) -> int:
        """Ranks over which gradients are summed and the optimizer's state is shared out."""
        return self.data * self.context

    @property
    def data_spans_nodes(self) -> bool:
        """Whether gradients cross the network: neighbours are tensor, then context, then data."""
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
        """Ranks that share out a row's images."""
        return self.context * self.tensor // self.tower

    @property
    def ends(self) -> list[int]:
        """Pipeline ranks among which the fullest and the slowest are; in between all are alike."""
        return list(range(self.pipeline)) if self.stage_layers else sorted({0, self.pipeline - 1})

    def stages(self, pipeline_rank: int) -> range:
        """Numbers of the stages that a rank of the pipeline holds."""
        return range(pipeline_rank, self.pipeline * self.virtual, self.pipeline)

    def layers(self, num_layers: int) -> list[range]:
        """Text layers of each stage."""
        num_stages = self.pipeline * self.virtual
        counts = self.stage_layers or (num_layers // num_stages,) * num_stages
        return [range(end - own, end) for own, end in zip(counts, accumulate(counts), strict=True)]

    def overrides(self, config: Config) -> list[str]:
        """As keys, `group.key=value`, that make a configuration one of this layout."""
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
        """In a line."""
        parts = [f"tensor {self.tensor}{'+sp' if self.sequence else ''}"]
        parts += [f"pipeline {self.pipeline}{f' x {self.virtual}' if self.virtual > 1 else ''}"]
        parts += [f"layers {'+'.join(map(str, self.stage_layers))}"] if self.stage_layers else []
        parts += [f"context {self.context}"] if self.context > 1 else []
        parts += [f"data {self.data}, recompute {self.recompute}"]
        parts += ["tower by images"] if self.vision == "images" else []
        return ", ".join(parts)


def cut_keys(layout: Layout | ParallelConfig) -> dict[str, str]:
    """Configuration keys of how layers and tower are cut, beside the numbers of ranks."""
    return {
        "parallel.virtual": str(layout.virtual),
        "parallel.stage_layers": f"[{','.join(map(str, layout.stage_layers))}]",
        "parallel.vision": layout.vision,
    }


def configured(config: Config, num_gpus: int) -> Layout | None:
    """The layout that a configuration names; None if it does not divide the GPUs."""
    parallel = config.parallel
    if num_gpus % parallel.replica_size or num_gpus % config.rollout.tensor_parallel:
        return None
    return Layout(
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        context=parallel.context,
        data=num_gpus // parallel.replica_size,
        sequence=parallel.sequence,
        recompute=config.model.recompute,
        engine=config.rollout.tensor_parallel,
        virtual=parallel.virtual,
        stage_layers=tuple(parallel.stage_layers),
        vision=parallel.vision,
    )


def check(hf_config: HFConfig, layout: Layout) -> None:
    """Refuse what the model refuses.

    Raises:
        ConfigError: the layout does not divide the model.
    """
    check_layout(
        hf_config,
        tensor=layout.tensor,
        tower=layout.tower,
        pipeline=layout.pipeline,
        virtual_stages=layout.virtual,
        stage_layers=layout.stage_layers,
        sequence_parallel=layout.sequence,
    )


def divides(hf_config: HFConfig, layout: Layout) -> bool:
    """Whether a model can be cut so."""
    try:
        check(hf_config, layout)
    except ConfigError:
        return False
    return True


def candidates(hf_config: HFConfig, num_gpus: int, most_data: int) -> Iterator[Layout]:
    """Layouts of the actor over some GPUs; tensor parallelism stays inside a machine.

    Args:
        hf_config: shape of the model.
        num_gpus: all of them are used.
        most_data: data-parallel ranks beyond it would have nothing to do.
    """
    for tensor in range(1, min(GPUS_PER_NODE, num_gpus) + 1):
        for pipeline in range(1, hf_config.text.num_layers + 1):
            layout = Layout(tensor, pipeline, sequence=tensor > 1)
            if num_gpus % (tensor * pipeline) or not divides(hf_config, layout):
                continue
            rest = num_gpus // (tensor * pipeline)
            for context in (1, 2, 4, LARGEST_CONTEXT):
                if rest % context or rest // context > most_data:
                    continue
                for recompute in ("none", "selective", "full"):
                    yield replace(
                        layout, context=context, data=rest // context, recompute=recompute
                    )


def engine_sizes(hf_config: HFConfig, num_gpus: int) -> list[int]:
    """Ranks that an engine replica may span: a divisor of all heads, inside a machine."""
    heads = hf_config.text.num_attention_heads, hf_config.vision.num_heads
    return [
        size
        for size in range(1, min(GPUS_PER_NODE, num_gpus) + 1)
        if num_gpus % size == 0 and not any(h % size for h in heads)
    ]
