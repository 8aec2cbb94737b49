"""A layout of the actor over ranks, and the layouts that a model allows.

In: a model's shape and a number of GPUs. Out: `Layout`s that pass the checks which the model
itself makes (heads, widths and layers divide).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_sr1.config import Config
from megatron_sr1.model.hf_config import HFConfig
from megatron_sr1.planning.hardware import GPUS_PER_NODE

LARGEST_CONTEXT = 8


@dataclass(frozen=True)
class Layout:
    """How the actor lies over ranks.

    Attributes:
        tensor: tensor-parallel ranks, neighbours.
        pipeline: stages.
        context: context-parallel ranks.
        data: data-parallel ranks.
        sequence: sequence parallelism.
        recompute: none | selective | full.
        engine: ranks of an engine replica.
    """

    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    data: int = 1
    sequence: bool = False
    recompute: str = "none"
    engine: int = 1

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

    def overrides(self, with_engine: bool) -> list[str]:
        """As configuration keys, `group.key=value`."""
        engine = [f"rollout.tensor_parallel={self.engine}"] if with_engine else []
        return [
            f"parallel.tensor={self.tensor}",
            f"parallel.pipeline={self.pipeline}",
            f"parallel.context={self.context}",
            f"parallel.sequence={str(self.sequence).lower()}",
            f"model.recompute={self.recompute}",
            *engine,
        ]

    def __str__(self) -> str:
        """In a line."""
        parts = [f"tensor {self.tensor}{'+sp' if self.sequence else ''}"]
        parts += [f"pipeline {self.pipeline}"]
        parts += [f"context {self.context}"] if self.context > 1 else []
        return f"{', '.join(parts)}, data {self.data}, recompute {self.recompute}"


def configured(config: Config, num_gpus: int) -> Layout | None:
    """The layout that a configuration names; None if it does not divide the GPUs."""
    parallel = config.parallel
    model_size = parallel.tensor * parallel.pipeline * parallel.context
    if num_gpus % model_size or num_gpus % config.rollout.tensor_parallel:
        return None
    return Layout(
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        context=parallel.context,
        data=num_gpus // model_size,
        sequence=parallel.sequence,
        recompute=config.model.recompute,
        engine=config.rollout.tensor_parallel,
    )


def divides(hf_config: HFConfig, tensor: int, pipeline: int) -> bool:
    """Whether a model can be cut so: what model/transformer_config.py asks for."""
    text, vision = hf_config.text, hf_config.vision
    sizes = (
        text.num_attention_heads,
        text.num_key_value_heads,
        text.intermediate_size,
        vision.num_heads,
        vision.intermediate_size,
    )
    return not any(size % tensor for size in sizes) and text.num_layers % pipeline == 0


def candidates(hf_config: HFConfig, num_gpus: int, most_data: int) -> Iterator[Layout]:
    """Layouts of the actor over some GPUs; tensor parallelism stays inside a machine.

    Args:
        hf_config: shape of the model.
        num_gpus: all of them are used.
        most_data: data-parallel ranks beyond it would have nothing to do.
    """
    for tensor in range(1, min(GPUS_PER_NODE, num_gpus) + 1):
        for pipeline in range(1, hf_config.text.num_layers + 1):
            if num_gpus % (tensor * pipeline) or not divides(hf_config, tensor, pipeline):
                continue
            rest = num_gpus // (tensor * pipeline)
            for context in (1, 2, 4, LARGEST_CONTEXT):
                if rest % context or rest // context > most_data:
                    continue
                for recompute in ("none", "selective", "full"):
                    yield Layout(tensor, pipeline, context, rest // context, tensor > 1, recompute)


def engine_sizes(hf_config: HFConfig, num_gpus: int) -> list[int]:
    """Ranks that an engine replica may span: a divisor of all heads, inside a machine."""
    heads = hf_config.text.num_attention_heads, hf_config.vision.num_heads
    return [
        size
        for size in range(1, min(GPUS_PER_NODE, num_gpus) + 1)
        if num_gpus % size == 0 and not any(h % size for h in heads)
    ]


def balanced_stages(first_work: float, layer_work: float, last_work: float, stages: int,
                    num_layers: int) -> list[int]:  # fmt: skip
    """Layers of each stage so that the busiest has the least to do.

    Args:
        first_work: of the first stage beside its layers (the tower).
        layer_work: of a layer, in the same unit.
        last_work: of the last stage beside its layers (the logits).
        stages: of the pipeline.
        num_layers: to deal out; each stage gets one at least where there are enough.
    """
    work = [0.0] * stages
    work[0] += first_work
    work[-1] += last_work
    layers = [0] * stages
    for stage in range(min(stages, num_layers)):
        layers[stage] = 1
    for _ in range(num_layers - sum(layers)):
        least = min(range(stages), key=lambda s: work[s] + (layers[s] + 1) * layer_work)
        layers[least] += 1
    return layers
