"""How long the actor takes: forward passes for logprobs, updates.

In: a model's shape, a layout, a GPU, the step's workload. Out: seconds. A micro-batch's stage takes
its products, its traffic of activations and the collectives of tensor and context parallelism, none
of which overlap here; a pipeline adds its bubble; an update ends with the sum over data-parallel
ranks and the optimizer.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sr1.config import Config
from megatron_sr1.model.hf_config import HFConfig
from megatron_sr1.planning import flops
from megatron_sr1.planning.activations import Kernels, text_layer_bytes, vision_bytes
from megatron_sr1.planning.engine_time import compute_seconds
from megatron_sr1.planning.hardware import (
    LINK_SHARE,
    MEMORY_SHARE,
    Gpu,
    all_reduce_seconds,
    gather_seconds,
)
from megatron_sr1.planning.layout import Layout
from megatron_sr1.planning.memory import DTYPE_BYTES, StaticMemory
from megatron_sr1.planning.workload import Workload


@dataclass(frozen=True)
class Actor:
    """The trained model on a cluster.

    Attributes:
        config: of the run.
        hf_config: shape of the model.
        layout: of its ranks.
        gpu: of its ranks.
        kernels: of its layers.
        held: by the fuller of the two ends of the pipeline.
        trains_tower: whether anything of the tower learns.
    """

    config: Config
    hf_config: HFConfig
    layout: Layout
    gpu: Gpu
    kernels: Kernels
    held: StaticMemory
    trains_tower: bool


def num_micro_batches(actor: Actor, work: Workload, sequences: float) -> float:
    """Rows of a data-parallel rank for some sequences of all ranks, at least one."""
    tokens = sequences * work.sequence_tokens / actor.layout.data
    return max(1.0, tokens / max(actor.config.data.pack_tokens, work.sequence_tokens))


def stage_seconds(actor: Actor, work: Workload, stage: int, with_backward: bool) -> float:
    """One micro-batch on one stage, its sequences as long as the mean one."""
    layout, hf_config, text = actor.layout, actor.hf_config, actor.hf_config.text
    row = max(actor.config.data.pack_tokens, work.sequence_tokens)
    tokens = row / layout.context
    keys = work.sequence_tokens * flops.CAUSAL_SHARE
    layers = text.num_layers // layout.pipeline
    layer = flops.text_layer(hf_config, tokens, keys)
    total = layer.times(layers)
    again = {"none": flops.Work(), "selective": flops.text_mlp(hf_config, tokens), "full": layer}
    repeated = again[layout.recompute].times(layers)
    frozen = flops.Work()
    if stage == layout.pipeline - 1:
        head = flops.head(hf_config, tokens)
        total += head
        repeated += head  # logits are made again in the backward pass
    joins = 0.0
    traffic = layers * tokens * text_layer_bytes(hf_config, layout, actor.kernels, "none")
    if stage == 0:
        patches = work.image_patches / work.sequence_tokens * tokens
        tower = flops.vision(hf_config, patches, work.image_patches)
        total += tower
        if not actor.trains_tower:
            frozen = tower
        elif layout.recompute != "none":
            repeated += tower
        traffic += patches * vision_bytes(hf_config, layout, actor.kernels, "none")
        vision_row = patches * hf_config.vision.hidden_size * actor.kernels.dtype_bytes
        joins = hf_config.vision.depth * _join_seconds(actor, vision_row)
    row_bytes = tokens * text.hidden_size * actor.kernels.dtype_bytes
    joins += layers * (_join_seconds(actor, row_bytes) + _context_seconds(actor, tokens))
    # What a layer keeps is written and read on the way forward; backward reads it and writes as
    # much of gradients, and reads those.
    moves = traffic / (actor.gpu.memory_rate * MEMORY_SHARE)
    if not with_backward:
        return compute_seconds(total, actor.gpu) / layout.tensor + 2 * moves + joins
    learning = total + frozen.times(-1)
    everything = total + flops.backward(learning) + repeated
    computing = compute_seconds(everything, actor.gpu) / layout.tensor
    forwards = 2 if layout.recompute == "full" else 1
    return computing + (2 * forwards + 3) * moves + (forwards + 1) * joins


def forward_seconds(actor: Actor, work: Workload) -> float:
    """Logprobs of the whole step."""
    return _pipeline_seconds(actor, work, work.num_sequences, with_backward=False)


def reference_seconds(actor: Actor, work: Workload) -> float:
    """The same with the reference's weights: two copies to the host, two back."""
    held = actor.held.weights
    return forward_seconds(actor, work) + 4 * held / (actor.gpu.host_rate * LINK_SHARE)


def update_seconds(actor: Actor, work: Workload) -> float:
    """All updates of a step."""
    share = work.num_sequences / work.num_updates
    once = _pipeline_seconds(actor, work, share, with_backward=True)
    return work.num_updates * (once + _sum_seconds(actor) + _optimizer_seconds(actor))


def step_work(hf_config: HFConfig, work: Workload) -> flops.Work:
    """Of a forward pass over the step's sequences, as the model needs it."""
    patches = work.image_patches
    keys = work.sequence_tokens * flops.CAUSAL_SHARE
    once = flops.forward(hf_config, work.sequence_tokens, keys, patches, patches)
    return once.times(work.num_sequences)


def update_work(actor: Actor, work: Workload) -> float:
    """Operations of the step's updates: thrice the forward pass, a frozen tower once."""
    total = 3 * step_work(actor.hf_config, work).total
    if actor.trains_tower or not work.image_tokens:
        return total
    tower = flops.vision(actor.hf_config, work.image_patches, work.image_patches)
    return total - 2 * tower.total * work.num_sequences


def _pipeline_seconds(actor: Actor, work: Workload, sequences: float, with_backward: bool) -> float:
    stages = actor.layout.pipeline
    slowest = max(stage_seconds(actor, work, s, with_backward) for s in {0, stages - 1})
    return slowest * (num_micro_batches(actor, work, sequences) + stages - 1)


def _join_seconds(actor: Actor, num_bytes: float) -> float:
    """A layer's two all-reduces over tensor-parallel ranks (or their halves, under sequence)."""
    return 2 * all_reduce_seconds(num_bytes, actor.layout.tensor, actor.gpu.nvlink_rate)


def _context_seconds(actor: Actor, tokens: float) -> float:
    """Keys and values of a layer, gathered over context-parallel ranks."""
    text, layout = actor.hf_config.text, actor.layout
    width = 2 * text.num_key_value_heads * text.head_dim / layout.tensor
    num_bytes = tokens * layout.context * width * actor.kernels.dtype_bytes
    return gather_seconds(num_bytes, layout.context, actor.gpu.nvlink_rate)


def _sum_seconds(actor: Actor) -> float:
    """Gradients summed over the ranks that share the state, and new weights gathered."""
    layout, gpu, held = actor.layout, actor.gpu, actor.held
    rate = gpu.network_rate if layout.data_spans_nodes else gpu.nvlink_rate
    if not actor.config.parallel.distributed_optimizer:
        return all_reduce_seconds(held.gradients, layout.num_sharing, rate)
    summed = gather_seconds(held.gradients, layout.num_sharing, rate)
    return summed + gather_seconds(held.weights, layout.num_sharing, rate)


def _optimizer_seconds(actor: Actor) -> float:
    """State read and written, gradients read; over PCIe both ways where it is offloaded."""
    held, gpu = actor.held, actor.gpu
    state = held.optimizer + held.host
    seconds = (2 * state + held.gradients) / (gpu.memory_rate * MEMORY_SHARE)
    return seconds + 2 * held.host / (gpu.host_rate * LINK_SHARE)


def kernels_of(config: Config) -> Kernels:
    """Of a configuration, on a GPU."""
    return Kernels(
        dtype_bytes=DTYPE_BYTES[config.model.dtype],
        fused_norm=config.model.spec == "transformer_engine",
    )
