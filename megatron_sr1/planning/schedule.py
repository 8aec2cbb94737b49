"""What a pipeline's schedule holds at a time, and how long it stands idle.

In: a layout. Out: micro-batches in flight on a rank; micro-batches that a step's rows count for.
With one stage a rank the schedule is 1F1B; with v of them it is the interleaved one of Narayanan et
al. (arXiv 2104.04473, section 2.2), as megatron/core/pipeline_parallel/schedules.py runs it: p rows
go through a rank's first stage, the same p through its second, and so on, then the next p; the
backward pass takes the stages the other way round.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from megatron_sr1.planning.layout import Layout

NUM_GROUPS = 3
"""Of p rows each: after so many all moments of the schedule have been there."""


def num_warmup(layout: Layout, pipeline_rank: int) -> int:
    """Forward passes of a rank, each of a row and a stage, before its first backward pass."""
    to_come = layout.pipeline - pipeline_rank - 1
    if layout.virtual == 1:
        return to_come
    return 2 * to_come + (layout.virtual - 1) * layout.pipeline


def in_flight(layout: Layout, pipeline_rank: int, stage_bytes: Sequence[float]) -> list[int]:
    """Micro-batches of each of a rank's stages whose activations it holds at the worst moment.

    Args:
        layout: of the actor.
        pipeline_rank: of the rank.
        stage_bytes: activations of a micro-batch on each of its stages.

    Returns:
        a number for each stage, where there are enough rows to fill the pipeline.
    """
    order = [stage for stage in range(layout.virtual) for _ in range(layout.pipeline)] * NUM_GROUPS
    warmup, last = num_warmup(layout, pipeline_rank), layout.virtual - 1
    held, worst, most = [0] * layout.virtual, [0] * layout.virtual, -1.0
    for number, stage in enumerate(order):
        held[stage] += 1
        num_bytes = sum(n * size for n, size in zip(held, stage_bytes, strict=True))
        if num_bytes > most:
            worst, most = list(held), num_bytes
        if number >= warmup:
            held[last - order[number - warmup]] -= 1
    return worst


def num_slots(layout: Layout, rows: float) -> float:
    """Micro-batches in whose time a pipeline is through with some rows, at least one.

    Ranks are idle while the pipeline fills and empties: p - 1 micro-batches' time, 1/v of it with v
    stages a rank. A last group of q < p rows takes p + (q - 1)/v, as its first row must come back
    from the last rank before it goes on through the next stage of the first.
    """
    ranks = layout.pipeline
    before = (math.ceil(rows / ranks - 1e-9) - 1) * ranks
    return before + ranks + (rows - before - 1) / layout.virtual


def balanced_stages(
    layout: Layout, num_layers: int, first_work: float, layer_work: float, last_work: float
) -> tuple[int, ...]:
    """Layers of each stage so that the busiest rank of the pipeline has the least to do.

    Args:
        layout: names ranks and stages.
        num_layers: to deal out; each stage gets one at least.
        first_work: of the first stage beside its layers (the tower).
        layer_work: of a layer, in the same unit.
        last_work: of the last stage beside its layers (the logits).
    """
    layers = [1] * (layout.pipeline * layout.virtual)
    beside = [first_work, *[0.0] * (len(layers) - 2), last_work]

    def work(stage: int) -> float:
        return beside[stage] + layers[stage] * layer_work

    for _ in range(num_layers - len(layers)):
        rank = min(range(layout.pipeline), key=lambda r: sum(map(work, layout.stages(r))))
        layers[min(layout.stages(rank), key=work)] += 1
    return tuple(layers)
