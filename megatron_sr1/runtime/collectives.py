"""Work that may fail on some ranks, and then fails on all with the same words.

In: a function a rank. Out: every rank's result, or one `CheckpointError` everywhere. A rank that
raised alone would leave the others waiting in a collective.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch.distributed as dist

from megatron_sr1.errors import CheckpointError
from megatron_sr1.runtime.device import Device, start_distributed
from megatron_sr1.runtime.groups import Group, Groups, gather_objects


def single_process() -> Groups:
    """Groups of one process that works on files: without Megatron, whose import takes seconds."""
    device = Device("cpu")
    start_distributed(device)
    world = dist.group.WORLD
    assert world is not None
    one = Group.of(world)
    assert one.size == 1, "a conversion is one process; start it without torchrun"
    return Groups(one, one, one, one, one, one, one, one, collection=None, device=device)


def on_all_ranks(groups: Groups, work: Callable[[], Any]) -> list[Any]:
    """Do something on each rank; collective over all ranks, and a barrier.

    Args:
        groups: the layout.
        work: of this rank; it may raise OSError and CheckpointError.

    Returns:
        every rank's result, in the world's order.

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
    """`on_all_ranks`, for rank 0 alone; all ranks get its result."""
    is_writer = groups.world.rank == 0
    return on_all_ranks(groups, work if is_writer else lambda: None)[0]


def agree(problems: Iterable[str | None]) -> None:
    """Raise the first problem of all ranks' (None: that rank had none)."""
    for problem in problems:
        if problem is not None:
            raise CheckpointError(problem)


def reason(error: BaseException) -> str:
    """First line of an error, of the first rank's where torch collected them."""
    failures = getattr(error, "failures", None)
    if failures:
        error = next(iter(failures.values()))[0]
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return (str(error).splitlines() or [type(error).__name__])[0]
