"""Work that may fail on some ranks, and then fails on all of them with the same message.

In: a function per rank. Out: every rank's result, or one `CheckpointError` on all ranks. If one
rank raised alone, the others would wait in a collective.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch.distributed as dist

from megatron_sr1.errors import CheckpointError
from megatron_sr1.runtime.device import Device, start_distributed
from megatron_sr1.runtime.groups import Group, Groups, gather_objects


def single_process() -> Groups:
    """Return the groups of a single process that converts files; Megatron is not imported."""
    device = Device("cpu")
    start_distributed(device)
    world = dist.group.WORLD
    assert world is not None
    one = Group.of(world)
    assert one.size == 1, "a conversion is one process; start it without torchrun"
    return Groups(one, one, one, one, one, one, one, one, collection=None, device=device)


def on_all_ranks(groups: Groups, work: Callable[[], Any]) -> list[Any]:
    """Call a function on each rank; collective over all ranks, and a barrier.

    Args:
        groups: of the layout.
        work: called on this rank; may raise OSError or CheckpointError.

    Returns:
        the results, by rank.

    Raises:
        CheckpointError: on all ranks, with the cause of the first rank that failed.
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
    """Raise the first problem; None stands for a rank that has none."""
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
