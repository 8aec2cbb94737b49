"""Process groups of the actor's layout: created once and passed as arguments, never None."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from megatron_sr1.config.model import ParallelConfig
from megatron_sr1.errors import ConfigError
from megatron_sr1.runtime import child_processes, cpu
from megatron_sr1.runtime.device import Device


@dataclass(frozen=True)
class Group:
    """A process group as this rank sees it.

    Attributes:
        process_group: torch's group.
        rank: of this process in the group.
        size: ranks in the group.
        ranks: their global ranks, in the group's order.
    """

    process_group: dist.ProcessGroup
    rank: int
    size: int
    ranks: tuple[int, ...]

    @classmethod
    def of(cls, group: dist.ProcessGroup) -> Group:
        """Wrap torch's group."""
        return cls(
            group,
            dist.get_rank(group),
            dist.get_world_size(group),
            tuple(dist.get_process_group_ranks(group)),
        )


@dataclass(frozen=True)
class Groups:
    """All process groups of a layout.

    Attributes:
        tensor: ranks that share each layer.
        pipeline: ranks that hold the stages, in order.
        context: ranks that share each sequence.
        data: ranks with the same shard of the model and different samples.
        data_context: data times context, over which gradients are summed.
        world: all ranks.
        tower: ranks that share each layer of the tower: `tensor`, or this rank alone.
        images: ranks among which a row's images are divided.
        collection: Megatron's `ProcessGroupCollection` of the same groups.
        device: where this rank computes.
    """

    tensor: Group
    pipeline: Group
    context: Group
    data: Group
    data_context: Group
    world: Group
    tower: Group
    images: Group
    collection: Any
    device: Device

    @property
    def is_first_stage(self) -> bool:
        """True if this rank holds the embedding and the vision tower."""
        return self.pipeline.rank == 0

    @property
    def is_last_stage(self) -> bool:
        """True if this rank holds the output layer."""
        return self.pipeline.rank == self.pipeline.size - 1

    @property
    def counts_tokens(self) -> bool:
        """True if this rank counts the tokens of its rows.

        All context-parallel ranks have the totals of the whole row; the first one counts them.
        """
        return self.context.rank == 0

    @property
    def is_replica_leader(self) -> bool:
        """True on exactly one of the ranks that process the same samples."""
        return self.tensor.rank == 0 and self.pipeline.rank == 0 and self.context.rank == 0


def make_groups(parallel: ParallelConfig, device: Device, *, on_host: bool = True) -> Groups:
    """Create Megatron's groups for a layout; torch.distributed must have been started.

    Args:
        parallel: sizes of the layout.
        device: where this rank computes.
        on_host: also create gloo groups, over which optimizer state is gathered in host memory.

    Raises:
        ConfigError: the layout does not divide the number of ranks.
    """
    cpu.install()
    child_processes.install()
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection

    world_size = dist.get_world_size()
    if world_size % parallel.replica_size:
        raise ConfigError(
            f"parallel.tensor={parallel.tensor} x pipeline={parallel.pipeline} x "
            f"context={parallel.context} = {parallel.replica_size} does not divide the "
            f"{world_size} ranks; change the layout or launch.num_processes"
        )
    with cpu.megatron_mode():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor,
            pipeline_model_parallel_size=parallel.pipeline,
            context_parallel_size=parallel.context,
            virtual_pipeline_model_parallel_size=parallel.virtual if parallel.virtual > 1 else None,
            create_gloo_process_groups=on_host,
        )
        collection = ProcessGroupCollection.use_mpu_process_groups()
    world = dist.group.WORLD
    assert world is not None
    tensor = Group.of(parallel_state.get_tensor_model_parallel_group())
    context = Group.of(parallel_state.get_context_parallel_group())
    tower, images = tensor, context
    if parallel.vision == "images" and tensor.size > 1:
        # Created by its one member, which avoids a collective over the world for every rank.
        alone = [dist.get_rank()]
        tower = Group.of(parallel_state.create_group(alone, use_local_synchronization=True))
        images = Group.of(parallel_state.get_tensor_and_context_parallel_group())
    return Groups(
        tensor=tensor,
        pipeline=Group.of(parallel_state.get_pipeline_model_parallel_group()),
        context=context,
        data=Group.of(parallel_state.get_data_parallel_group()),
        data_context=Group.of(parallel_state.get_data_parallel_group(with_context_parallel=True)),
        world=Group.of(world),
        tower=tower,
        images=images,
        collection=collection,
        device=device,
    )


def destroy_groups() -> None:
    """Undo `make_groups`, so that other groups can be made; collective over all ranks.

    Megatron itself only drops its references: the groups' threads would live on, busy waiting, as
    do those of a model that still exists. Groups created by others, such as an engine in this
    process, stay.
    """
    from megatron.core import parallel_state

    dist.barrier()
    for group in parallel_state._global_process_group_list or []:
        if group is not None:  # None stands for the world
            dist.destroy_process_group(group)
    parallel_state.destroy_model_parallel()
    gc.collect()  # models and optimizers hold groups in reference cycles


def gather_objects(value: Any, group: Group | None = None) -> list[Any]:
    """Gather every rank's value, in the group's order; in the world's without a group.

    For small Python objects of our own only: they are pickled.
    """
    size = dist.get_world_size() if group is None else group.size
    if size == 1:
        return [value]
    gathered: list[Any] = [None] * size
    dist.all_gather_object(gathered, value, group=group and group.process_group)
    return gathered
