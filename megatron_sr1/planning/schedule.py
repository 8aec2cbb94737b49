"""A pipeline's schedule: what a rank holds at a time, the bubble, balanced stages.

In: a layout. Out: micro-batches in flight on a rank; the time of a step's rows in micro-batches.
With one stage per rank the schedule is 1F1B. With v stages per rank it is the interleaved schedule
of Narayanan et al. (arXiv 2104.04473, section 2.2) as implemented by
megatron/core/pipeline_parallel/schedules.py: p rows pass a rank's first stage, then its second, and
so on, before the next p rows; the backward pass visits the stages in reverse.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from megatron_sr1.planning.layout import Layout

NUM_GROUPS = 3
"""Groups of p rows after which the schedule has passed through all of its states."""


def num_warmup(layout: Layout, pipeline_rank: int) -> int:
    """Return a rank's forward passes, of one row in one stage, before its first backward pass."""
    to_come = layout.pipeline - pipeline_rank - 1
    if layout.virtual == 1:
        return to_come
    return 2 * to_come + (layout.virtual - 1) * layout.pipeline


def in_flight(layout: Layout, pipeline_rank: int, stage_bytes: Sequence[float]) -> list[int]:
    """Return how many micro-batches a rank holds in each of its stages at peak memory.

    Args:
        layout: of the actor.
        pipeline_rank: of the rank.
        stage_bytes: activations of one micro-batch in each of the rank's stages.
    """
    order = [stage for stage in range(layout.virtual) for _ in range(layout.pipeline)] * NUM_GROUPS
    warmup, last = num_warmup(layout, pipeline_rank), layout.virtual - 1
    held, worst, peak = [0] * layout.virtual, [0] * layout.virtual, -1.0
    for number, stage in enumerate(order):
        held[stage] += 1
        num_bytes = sum(n * size for n, size in zip(held, stage_bytes, strict=True))
        if num_bytes > peak:
            worst, peak = list(held), num_bytes
        if number >= warmup:
            held[last - order[number - warmup]] -= 1
    return worst


def num_slots(layout: Layout, rows: float) -> float:
    """Return the time of `rows` rows in a pipeline, in units of a micro-batch on one rank.

    Ranks are idle for p - 1 micro-batches while the pipeline fills and drains, or 1/v of that with
    v stages per rank. A last group of q < p rows takes p + (q - 1)/v, because its first row must
    return from the last rank before it enters the next stage of the first.
    """
    ranks = layout.pipeline
    before = (math.ceil(rows / ranks - 1e-9) - 1) * ranks
    return before + ranks + (rows - before - 1) / layout.virtual


def balanced_stages(
    layout: Layout, num_layers: int, first: float, layer: float, last: float
) -> tuple[int, ...]:
    """Return the layers per stage, at least one, that minimize the time of the slowest rank.

    Args:
        layout: gives the ranks and their stages.
        num_layers: to distribute.
        first: time of the first stage without its layers (the tower).
        layer: time of a layer.
        last: time of the last stage without its layers (the logits).
    """
    layers = [1] * (layout.pipeline * layout.virtual)
    others = [first, *[0.0] * (len(layers) - 2), last]

    def seconds(stage: int) -> float:
        return others[stage] + layers[stage] * layer

    for _ in range(num_layers - len(layers)):
        rank = min(range(layout.pipeline), key=lambda r: sum(map(seconds, layout.stages(r))))
        layers[min(layout.stages(rank), key=seconds)] += 1
    return tuple(layers)
