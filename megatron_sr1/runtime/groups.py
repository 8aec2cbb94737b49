"""Process groups of the actor's layout, created once and passed as arguments.

With them: collectives over Python objects, work that fails on all ranks if it fails on one (if one
rank raised alone, the others would wait in a collective), and fair shares.
"""

from __future__ import annotations

import heapq
import pickle
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megatron_sr1.config.run import ParallelConfig
from megatron_sr1.errors import CheckpointError, ConfigError
from megatron_sr1.runtime import cpu, signals
from megatron_sr1.runtime.device import start_distributed

HOME_LOAD = 1.01
"""Load of a share, relative to the mean, up to which items stay at home in `share_out`."""


@dataclass(frozen=True)
class Group:
    """A process group as this rank sees it.

    Attributes:
        rank: of this process in the group.
        ranks: their global ranks, in the group's order.
    """

    process_group: dist.ProcessGroup
    rank: int
    size: int
    ranks: tuple[int, ...]

    @classmethod
    def of(cls, group: dist.ProcessGroup | None) -> Group:
        """Wrap torch's group."""
        assert group is not None, "torch.distributed has not been started"
        ranks = dist.get_process_group_ranks(group)
        return cls(group, dist.get_rank(group), len(ranks), tuple(ranks))


@dataclass(frozen=True)
class Groups:
    """All process groups of a layout.

    Attributes:
        tensor: ranks that share each layer.
        pipeline: ranks that hold the stages, in order.
        context: ranks that share each sequence.
        data: ranks with the same shard of the model and different samples.
        data_context: data times context, over which gradients are summed.
        tower: ranks that share each layer of the tower: `tensor`, or this rank alone.
        images: ranks among which a row's images are divided.
        background: all ranks, on the host, for collectives of threads beside the main one, and of
            the main one while there is none.
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
    background: Group
    collection: Any
    device: torch.device

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
        """True on the one context-parallel rank that counts a row's tokens; all have its totals."""
        return self.context.rank == 0

    @property
    def is_replica_leader(self) -> bool:
        """True on exactly one of the ranks that process the same samples."""
        return self.tensor.rank == 0 and self.pipeline.rank == 0 and self.context.rank == 0


def make_groups(
    parallel: ParallelConfig,
    device: torch.device,
    *,
    on_host: bool = True,
    timeout_seconds: float = 1800.0,
) -> Groups:
    """Create Megatron's groups for a layout; torch.distributed must have been started.

    With `on_host`, also create gloo groups, over which optimizer state is gathered in host memory,
    and `background`, which otherwise is the world.
    `timeout_seconds` is the time limit of a collective in any of the groups.
    Raise a ConfigError if the layout does not divide the number of ranks.
    """
    cpu.install()
    signals.tie_checkpoint_writers()
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
            distributed_timeout_minutes=timeout_seconds / 60,
            create_gloo_process_groups=on_host,
        )
        collection = ProcessGroupCollection.use_mpu_process_groups()
    limit = timedelta(seconds=timeout_seconds)
    background = dist.group.WORLD
    if on_host:
        everyone = list(range(world_size))
        background = parallel_state.create_group(everyone, timeout=limit, backend="gloo")
    tensor = Group.of(parallel_state.get_tensor_model_parallel_group())
    context = Group.of(parallel_state.get_context_parallel_group())
    tower, images = tensor, context
    if parallel.vision == "images" and tensor.size > 1:
        # Created by its one member, which avoids a collective over the world for every rank.
        alone = parallel_state.create_group(
            [dist.get_rank()], timeout=limit, use_local_synchronization=True
        )
        tower = Group.of(alone)
        images = Group.of(parallel_state.get_tensor_and_context_parallel_group())
    return Groups(
        tensor=tensor,
        pipeline=Group.of(parallel_state.get_pipeline_model_parallel_group()),
        context=context,
        data=Group.of(parallel_state.get_data_parallel_group()),
        data_context=Group.of(parallel_state.get_data_parallel_group(with_context_parallel=True)),
        world=Group.of(dist.group.WORLD),
        tower=tower,
        images=images,
        background=Group.of(background),
        collection=collection,
        device=device,
    )


def single_process() -> Groups:
    """Return the groups of a single process that converts files; Megatron is not imported."""
    device = torch.device("cpu")
    start_distributed(device)
    one = Group.of(dist.group.WORLD)
    assert one.size == 1, "a conversion is one process; start it without torchrun"
    return Groups(one, one, one, one, one, one, one, one, one, collection=None, device=device)


def gather_objects(value: Any, group: Group | None = None) -> list[Any]:
    """Gather every rank's value, in the order of the group (by default the world).

    Only for small Python objects that this program has made: they are pickled. This rank's own is
    the object itself.
    """
    group = group or Group.of(dist.group.WORLD)
    if group.size == 1:
        return [value]
    pickled = [b""] * group.size
    dist.all_gather_object(pickled, pickle.dumps(value), group=group.process_group)
    return [value if n == group.rank else pickle.loads(p) for n, p in enumerate(pickled)]


def gather_rows(
    rows: Sequence[Sequence[int]], shape: tuple[int, int], group: Group
) -> list[list[int]]:
    """Gather every rank's rows of integers, in the order of the group, a gloo group.

    `shape` is the most rows that a rank has, and their length; the first number of a row is at
    least 0.
    """
    own = torch.full(shape, -1)
    if rows:
        own[: len(rows)] = torch.tensor(rows)
    parts = [torch.empty_like(own) for _ in group.ranks]
    dist.all_gather(parts, own, group=group.process_group)
    return [row for row in torch.cat(parts).tolist() if row[0] >= 0]


def gather_on_first(value: Any, group: Group) -> list[Any]:
    """Gather every rank's value on the group's first one, as `gather_objects`; [] on the others."""
    if group.size == 1:
        return [value]
    is_first, first = group.rank == 0, group.ranks[0]
    found: list[Any] = [None] * group.size
    sent = None if is_first else value
    dist.gather_object(sent, found if is_first else None, first, group.process_group)
    return [value, *found[1:]] if is_first else []


def sum_over_ranks(groups: Groups, values: Mapping[str, float]) -> dict[str, float]:
    """Return sums over the world, equal on all ranks, all of which have the same names.

    May run in a thread beside the main one: see `Groups.background`.
    """
    total = torch.tensor(list(values.values()), dtype=torch.float64)
    if groups.background.size > 1:
        dist.all_reduce(total, group=groups.background.process_group)
    return dict(zip(values, total.tolist(), strict=True))


def on_all_ranks(groups: Groups, work: Callable[[], Any]) -> list[Any]:
    """Call a function on each rank and return the results by rank; a barrier over all ranks.

    If calls raise OSError or CheckpointError, all ranks raise CheckpointError with the first cause.
    """
    result, problem = None, None
    try:
        result = work()
    except (OSError, CheckpointError) as error:
        problem = reason(error)
    outcomes = gather_objects((result, problem), groups.world)
    agree(problem for _, problem in outcomes)
    return [result for result, _ in outcomes]


def on_writer(groups: Groups, work: Callable[[], Any]) -> Any:
    """Call a function on rank 0, as `on_all_ranks` does, and return its result on all ranks."""
    is_writer = groups.world.rank == 0
    return on_all_ranks(groups, work if is_writer else lambda: None)[0]


def agree(problems: Iterable[str | None]) -> None:
    """Raise the first problem; None stands for a rank without one."""
    for problem in problems:
        if problem is not None:
            raise CheckpointError(problem)


def reason(error: BaseException) -> str:
    """Return the first line of an error; the first rank's if torch collected several."""
    failures = getattr(error, "failures", None)
    if failures:
        error = next(iter(failures.values()))[0]
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return (str(error).splitlines() or [type(error).__name__])[0]


def share_out(
    costs: Sequence[float], num_shares: int, homes: Sequence[int] = ()
) -> list[list[int]]:
    """Partition items by cost: the largest first, each to the share with the least load.

    With `homes`, an item goes to its home share while that stays within `HOME_LOAD` of the mean.
    No two shares differ by more than the largest item (Graham, 1969, doi:10.1137/0117039) or, with
    homes, by that and the tolerance. Return the indices of each share's items, in the order of
    assignment; a share may be empty.
    """
    shares: list[list[int]] = [[] for _ in range(num_shares)]
    loads = [0.0] * num_shares
    least = [(0.0, share) for share in range(num_shares)]  # a heap, with loads of the past too
    limit = HOME_LOAD * sum(costs) / max(num_shares, 1)
    for number in sorted(range(len(costs)), key=lambda n: -costs[n]):
        while least[0][0] != loads[least[0][1]]:
            heapq.heappop(least)
        share = least[0][1]
        if homes and loads[homes[number]] + costs[number] <= limit:
            share = homes[number]
        shares[share].append(number)
        loads[share] += costs[number]
        heapq.heappush(least, (loads[share], share))
    return shares
