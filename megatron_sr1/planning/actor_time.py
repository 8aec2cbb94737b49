"""How long one micro-batch takes on one rank of a pipeline.

In: a model's shape, a layout, a GPU, mean lengths. Out: seconds of a layer, of the tower, of the
logits, and their sum over the stages of a rank. Each takes its products, its traffic of activations
and its collectives, none of which overlap here; between stages rows are sent on.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sr1.config import Config
from megatron_sr1.model import flops
from megatron_sr1.model.hf_config import HFConfig
from megatron_sr1.planning.activations import Kernels, text_layer_bytes, vision_bytes
from megatron_sr1.planning.costs import (
    all_reduce_seconds,
    compute_seconds,
    gather_seconds,
    memory_seconds,
    transfer_seconds,
)
from megatron_sr1.planning.layout import Layout
from megatron_sr1.planning.schedule import balanced_stages
from megatron_sr1.planning.workload import Workload
from megatron_sr1.runtime.gpus import GPUS_PER_NODE, Gpu


@dataclass(frozen=True)
class Actor:
    """The trained model on a cluster, and what it learns from.

    Attributes:
        config: of the run.
        hf_config: shape of the model.
        layout: of its ranks.
        gpu: of its ranks.
        kernels: of its layers.
        trains_tower: whether anything of the tower learns.
        work: a step's sequences, by their means.
    """

    config: Config
    hf_config: HFConfig
    layout: Layout
    gpu: Gpu
    kernels: Kernels
    trains_tower: bool
    work: Workload

    @property
    def row_tokens(self) -> float:
        """Of a micro-batch, on all context-parallel ranks."""
        return max(self.config.data.row_budget, self.work.sequence_tokens)

    @property
    def tokens(self) -> float:
        """Of the rank's share of the row."""
        return self.row_tokens / self.layout.context

    @property
    def row_bytes(self) -> float:
        """Of the share's hidden states, whole over tensor-parallel ranks."""
        return self.tokens * self.hf_config.text.hidden_size * self.kernels.dtype_bytes

    @property
    def patches(self) -> float:
        """That a rank encodes of a row: its share, but at least an image, as that stays whole."""
        row = self.row_tokens * self.work.image_patches / self.work.sequence_tokens
        return max(row / self.layout.images, self.work.image_patches)


@dataclass(frozen=True)
class Part:
    """What a micro-batch asks of a part of a stage.

    Attributes:
        work: operations of the forward pass, of all ranks that split it.
        ranks: that split it.
        again: operations that the backward pass does again.
        traffic: bytes that the forward pass leaves behind without recomputation.
        joins: seconds of a pass's collectives.
        is_repeated: whether recomputation moves and joins everything again.
        learns: whether there is a backward pass.
    """

    work: flops.Work
    ranks: int
    again: flops.Work
    traffic: float = 0.0
    joins: float = 0.0
    is_repeated: bool = False
    learns: bool = True

    def seconds(self, gpu: Gpu, with_backward: bool) -> float:
        """Of the forward pass, or of both.

        What a layer keeps is written and read on the way forward; backward reads it and writes as
        much of gradients, and reads those.
        """
        moves = memory_seconds(self.traffic, gpu)
        if not (with_backward and self.learns):
            return compute_seconds(self.work, gpu) / self.ranks + 2 * moves + self.joins
        everything = self.work + flops.backward(self.work) + self.again
        forwards = 2 if self.is_repeated else 1
        computing = compute_seconds(everything, gpu) / self.ranks
        return computing + (2 * forwards + 3) * moves + (forwards + 1) * self.joins


def text_layer(actor: Actor) -> Part:
    """A decoder layer."""
    layout, hf_config, tokens = actor.layout, actor.hf_config, actor.tokens
    layer = flops.text_layer(hf_config, tokens, actor.work.sequence_tokens * flops.CAUSAL_SHARE)
    again = {"none": flops.Work(), "selective": flops.text_mlp(hf_config, tokens), "full": layer}
    joins = _join_seconds(actor, actor.row_bytes, layout.tensor) + _context_seconds(actor)
    return Part(
        layer,
        layout.tensor,
        again[layout.recompute],
        tokens * text_layer_bytes(hf_config, layout, actor.kernels, "none"),
        joins,
        is_repeated=layout.recompute == "full",
    )


def tower(actor: Actor) -> Part:
    """The tower on the images of a rank; any recomputation does it again."""
    layout, hf_config, patches = actor.layout, actor.hf_config, actor.patches
    whole = flops.vision(hf_config, patches, actor.work.image_patches)
    is_repeated = layout.recompute != "none"
    width = hf_config.vision.hidden_size * actor.kernels.dtype_bytes
    joins = hf_config.vision.depth * _join_seconds(actor, patches * width, layout.tower)
    image_share = actor.work.image_tokens / actor.work.sequence_tokens
    features = image_share * actor.row_bytes * layout.context
    joins += gather_seconds(features, layout.images, actor.gpu.nvlink_rate)
    return Part(
        whole,
        layout.tower,
        whole if is_repeated else flops.Work(),
        patches * vision_bytes(hf_config, layout, actor.kernels, "none"),
        joins,
        is_repeated,
        learns=actor.trains_tower,
    )


def logits(actor: Actor) -> Part:
    """The output layer, whose logits are made again in the backward pass."""
    head = flops.head(actor.hf_config, actor.tokens)
    return Part(head, actor.layout.tensor, head)


def rank_seconds(actor: Actor, pipeline_rank: int, with_backward: bool) -> float:
    """A micro-batch on all stages of a rank."""
    layout, gpu = actor.layout, actor.gpu
    stages = layout.layers(actor.hf_config.text.num_layers)
    layer, seconds = text_layer(actor).seconds(gpu, with_backward), 0.0
    for stage in layout.stages(pipeline_rank):
        seconds += len(stages[stage]) * layer
        if stage == 0 and actor.work.image_tokens:
            seconds += tower(actor).seconds(gpu, with_backward)
        if stage == len(stages) - 1:
            seconds += logits(actor).seconds(gpu, with_backward)
        else:
            seconds += _send_seconds(actor) * (2 if with_backward else 1)
    return seconds


def balanced_layers(actor: Actor) -> tuple[int, ...]:
    """Text layers of each stage so that the slowest rank is through with a row soonest."""
    first = tower(actor).seconds(actor.gpu, True) if actor.work.image_tokens else 0.0
    layer, last = (part(actor).seconds(actor.gpu, True) for part in (text_layer, logits))
    return balanced_stages(actor.layout, actor.hf_config.text.num_layers, first, layer, last)


def _join_seconds(actor: Actor, num_bytes: float, ranks: int) -> float:
    """A layer's two all-reduces over tensor-parallel ranks (or their halves, under sequence)."""
    return 2 * all_reduce_seconds(num_bytes, ranks, actor.gpu.nvlink_rate)


def _context_seconds(actor: Actor) -> float:
    """Keys and values of a layer, gathered over context-parallel ranks."""
    text, layout = actor.hf_config.text, actor.layout
    width = 2 * text.num_key_value_heads * text.head_dim / layout.tensor
    num_bytes = actor.row_tokens * width * actor.kernels.dtype_bytes
    return gather_seconds(num_bytes, layout.context, actor.gpu.nvlink_rate)


def _send_seconds(actor: Actor) -> float:
    """Hidden states to the next stage; pipeline ranks are the farthest of all."""
    layout, gpu = actor.layout, actor.gpu
    rate = gpu.network_rate if layout.num_ranks > GPUS_PER_NODE else gpu.nvlink_rate
    split = layout.tensor if layout.sequence else 1
    return transfer_seconds(actor.row_bytes / split, rate)
