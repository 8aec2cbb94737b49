"""Formulas of the pipeline's schedule compared with the schedule, step by step.

What Megatron's schedule holds at a time is measured in tests/distributed/test_planned_memory.py.
"""

import math

import pytest
from megatron.core.pipeline_parallel.schedules import get_schedule_table

from megatron_sr1.planning.layout import Layout, in_flight, num_slots, num_warmup

BACKWARD = 2  # times as long as the forward pass


def steps_of(layout, rank, rows, with_backward):
    """Return (is forward, row, stage of the rank) in the order of a rank."""
    table = get_schedule_table(rows, layout.virtual, layout.pipeline)
    forward = [(True, row, stage) for row, stage in table]
    if not with_backward:
        return forward
    backward = [(False, row, layout.virtual - 1 - stage) for row, stage in table]
    warmup = min(num_warmup(layout, rank), len(table))
    pairs = zip(forward[warmup:], backward, strict=False)
    return forward[:warmup] + [s for pair in pairs for s in pair] + backward[len(table) - warmup :]


def slots(layout, rows, with_backward):
    """Return the time of all rows, in rows on a rank; rows that pad the last group take none."""
    filled = rows if layout.virtual == 1 else math.ceil(rows / layout.pipeline) * layout.pipeline
    todo = [steps_of(layout, rank, filled, with_backward) for rank in range(layout.pipeline)]
    last = layout.pipeline * layout.virtual - 1
    ended, free = {}, [0.0] * layout.pipeline
    while any(todo):
        for rank, steps in enumerate(todo):
            if not steps:
                continue
            is_forward, row, chunk = steps[0]
            stage = chunk * layout.pipeline + rank
            needed = (is_forward, row, stage + (-1 if is_forward else 1))
            if is_forward and stage == 0:
                ended[needed] = 0.0
            elif not is_forward and stage == last:
                needed = (True, row, stage)
            if needed in ended:
                takes = (1 if is_forward else BACKWARD) / layout.virtual if row < rows else 0.0
                free[rank] = max(free[rank], ended[needed]) + takes
                ended[steps.pop(0)[0], row, stage] = free[rank]
    return max(free) / (1 + BACKWARD if with_backward else 1)


@pytest.mark.parametrize("virtual", [1, 2, 4])
@pytest.mark.parametrize("pipeline", [2, 4, 8])
@pytest.mark.parametrize("rows", [1, 3, 8, 9, 16, 21])
def test_slots_are_those_of_the_schedule(pipeline, virtual, rows):
    """Exact forward, and both ways if rows fill their groups; otherwise up to 12 % too long."""
    layout = Layout(pipeline=pipeline, virtual=virtual)
    planned = num_slots(layout, rows)
    assert planned == pytest.approx(slots(layout, rows, with_backward=False))
    both = slots(layout, rows, with_backward=True)
    if rows % pipeline == 0 or virtual == 1:
        assert planned == pytest.approx(both)
    assert both <= planned + 1e-9 and planned < 1.12 * both


@pytest.mark.parametrize("virtual", [1, 2, 3])
@pytest.mark.parametrize("rank", range(4))
def test_micro_batches_in_flight_are_those_of_the_schedule(virtual, rank):
    layout = Layout(pipeline=4, virtual=virtual)
    for weights in ([1.0] * virtual, [5.0, *[1.0] * (virtual - 1)], [*range(1, virtual + 1)]):
        held, most = [0] * virtual, 0.0
        for is_forward, _, stage in steps_of(layout, rank, 20, with_backward=True):
            held[stage] += 1 if is_forward else -1
            most = max(most, sum(n * weight for n, weight in zip(held, weights, strict=True)))
        planned = in_flight(layout, rank, weights)
        assert sum(n * weight for n, weight in zip(planned, weights, strict=True)) == most


def test_with_one_stage_per_rank_one_micro_batch_is_in_flight_for_each_stage_to_come():
    layout = Layout(pipeline=3)
    assert [in_flight(layout, rank, [1.0]) for rank in range(3)] == [[3], [2], [1]]
    assert in_flight(Layout(pipeline=2, virtual=2), 0, [1.0, 1.0]) == [3, 2]
