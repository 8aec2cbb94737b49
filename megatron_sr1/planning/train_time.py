"""How long the actor takes: forward passes for logprobs, updates.

In: the actor on its cluster. Out: seconds. The slowest rank of the pipeline takes its time for each
micro-batch, and the pipeline its bubble; an update ends with the sum over data-parallel ranks and
the optimizer.
"""

from __future__ import annotations

from megatron_sr1.checkpoint.mapping import TOWER
from megatron_sr1.config import Config
from megatron_sr1.model import flops
from megatron_sr1.model.hf_config import HFConfig
from megatron_sr1.planning.activations import Kernels
from megatron_sr1.planning.actor_time import Actor, rank_seconds
from megatron_sr1.planning.costs import (
    all_reduce_seconds,
    gather_seconds,
    memory_seconds,
    transfer_seconds,
)
from megatron_sr1.planning.schedule import num_slots
from megatron_sr1.planning.static_memory import DTYPE_BYTES, StaticMemory, num_parameters
from megatron_sr1.planning.workload import Workload


def num_micro_batches(actor: Actor, sequences: float) -> float:
    """Rows of a data-parallel rank for some sequences of all ranks, at least one."""
    tokens = sequences * actor.work.sequence_tokens / actor.layout.data
    return max(1.0, tokens / actor.row_tokens)


def forward_seconds(actor: Actor) -> float:
    """Logprobs of the whole step."""
    return _pipeline_seconds(actor, actor.work.num_sequences, with_backward=False)


def reference_seconds(actor: Actor, held: StaticMemory) -> float:
    """The same with the reference's weights: two copies to the host, two back."""
    return forward_seconds(actor) + transfer_seconds(4 * held.weights, actor.gpu.host_rate)


def update_seconds(actor: Actor, held: StaticMemory) -> float:
    """All updates of a step, on ranks that hold so much."""
    work = actor.work
    share = work.num_sequences / work.num_updates
    once = _pipeline_seconds(actor, share, with_backward=True)
    joined = _sum_seconds(actor, held) + _tower_sum_seconds(actor)
    return work.num_updates * (once + joined + _optimizer_seconds(actor, held))


def step_work(hf_config: HFConfig, work: Workload) -> flops.Work:
    """Of a forward pass over the step's sequences, as the model needs it."""
    patches = work.image_patches
    keys = work.sequence_tokens * flops.CAUSAL_SHARE
    once = flops.forward(hf_config, work.sequence_tokens, keys, patches, patches)
    return once.times(work.num_sequences)


def update_work(actor: Actor) -> float:
    """Operations of the step's updates: thrice the forward pass, a frozen tower once."""
    work = actor.work
    total = 3 * step_work(actor.hf_config, work).total
    if actor.trains_tower or not work.image_tokens:
        return total
    tower = flops.vision(actor.hf_config, work.image_patches, work.image_patches)
    return total - 2 * tower.total * work.num_sequences


def _pipeline_seconds(actor: Actor, sequences: float, with_backward: bool) -> float:
    slowest = max(rank_seconds(actor, rank, with_backward) for rank in actor.layout.ends)
    return slowest * num_slots(actor.layout, num_micro_batches(actor, sequences))


def _sum_seconds(actor: Actor, held: StaticMemory) -> float:
    """Gradients summed over the ranks that share the state, and new weights gathered."""
    layout, gpu = actor.layout, actor.gpu
    rate = gpu.network_rate if layout.data_spans_nodes else gpu.nvlink_rate
    if not actor.config.parallel.distributed_optimizer:
        return all_reduce_seconds(held.gradients, layout.num_sharing, rate)
    summed = gather_seconds(held.gradients, layout.num_sharing, rate)
    return summed + gather_seconds(held.weights, layout.num_sharing, rate)


def _tower_sum_seconds(actor: Actor) -> float:
    """Gradients of a tower that is whole on tensor-parallel ranks, summed over those."""
    layout = actor.layout
    if layout.tower == layout.tensor or not actor.trains_tower:
        return 0.0
    held = DTYPE_BYTES[actor.config.optimizer.gradients] * num_parameters(actor.hf_config, TOWER)
    return all_reduce_seconds(held, layout.tensor, actor.gpu.nvlink_rate)


def _optimizer_seconds(actor: Actor, held: StaticMemory) -> float:
    """State read and written, gradients read; over PCIe both ways where it is in host memory."""
    gpu, state = actor.gpu, held.optimizer + held.host
    seconds = memory_seconds(2 * state + held.gradients, gpu)
    config = actor.config
    moves = config.stage == "grpo" and config.rollout.make_room == "optimizer"
    return seconds + transfer_seconds(2 * (state if moves else held.host), gpu.host_rate)


def kernels_of(config: Config) -> Kernels:
    """Of a configuration, on a GPU."""
    return Kernels(
        dtype_bytes=DTYPE_BYTES[config.model.dtype],
        fused_norm=config.model.spec == "transformer_engine",
    )
