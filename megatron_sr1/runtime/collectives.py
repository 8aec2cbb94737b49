"""Collectives over Python objects, and work that fails on all ranks if it fails on one.

If one rank raised alone, the others would wait in a collective.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist

from megatron_sr1.errors import CheckpointError
from megatron_sr1.runtime.device import Device, start_distributed
from megatron_sr1.runtime.groups import Group, Groups


def single_process() -> Groups:
    """Return the groups of a single process that converts files; Megatron is not imported."""
    device = Device("cpu")
    start_distributed(device)
    one = Group.of(dist.group.WORLD)
    assert one.size == 1, "a conversion is one process; start it without torchrun"
    return Groups(one, one, one, one, one, one, one, one, collection=None, device=device)


def gather_objects(value: Any, group: Group | None = None) -> list[Any]:
    """Gather every rank's value, in the order of the group (by default the world).

    Only for small Python objects that this program has made: they are pickled.
    """
    size = dist.get_world_size() if group is None else group.size
    if size == 1:
        return [value]
    gathered: list[Any] = [None] * size
    dist.all_gather_object(gathered, value, group=group and group.process_group)
    return gathered


def sum_over_ranks(groups: Groups, values: Mapping[str, float]) -> dict[str, float]:
    """Return sums over the world, equal on all ranks, all of which have the same names."""
    total = torch.tensor(list(values.values()), dtype=torch.float64)
    if groups.world.size > 1:
        total = total.to(groups.device.torch)
        dist.all_reduce(total)
    return dict(zip(values, total.tolist(), strict=True))


def on_all_ranks(groups: Groups, work: Callable[[], Any]) -> list[Any]:
    """Call a function on each rank and return the results by rank; a barrier over all ranks.

    Raises:
        CheckpointError: on all ranks, with the cause of the first rank whose call raised OSError
            or CheckpointError.
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
