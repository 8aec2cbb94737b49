"""Records the work of each engine step, for a cost model to replay.

In: an engine. Out: one record per step, read from vLLM's own scheduler, so that prefix-cache hits,
token budgets and slots are the real ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from megatron_sr1.rollout.engine import Engine


@dataclass(frozen=True)
class EngineStep:
    """The work of one engine step.

    Attributes:
        prefill_tokens: prompt tokens computed, without cached ones.
        prefill_sequences: sequences that these prompt tokens belong to.
        decoding_sequences: sequences that continued after an earlier sampled token.
        context_tokens: tokens attended to, including those of this step, summed over the step's
            sequences.
    """

    prefill_tokens: int
    prefill_sequences: int
    decoding_sequences: int
    context_tokens: int


@contextmanager
def recorded(engine: Engine) -> Iterator[list[EngineStep]]:
    """Record the engine's steps inside the block; steps that schedule nothing are skipped."""
    scheduler, steps = engine.scheduler, list[EngineStep]()
    schedule = scheduler.schedule

    def watched(*arguments: Any, **settings: Any) -> Any:
        planned = schedule(*arguments, **settings)
        if planned.num_scheduled_tokens:
            steps.append(_step(planned))
        return planned

    scheduler.schedule = watched
    try:
        yield steps
    finally:
        scheduler.schedule = schedule


def _step(planned: Any) -> EngineStep:
    """Convert vLLM's SchedulerOutput to a record."""
    new, running = planned.scheduled_new_reqs, planned.scheduled_cached_reqs
    before = {request.req_id: request.num_computed_tokens for request in new}
    before |= dict(zip(running.req_ids, running.num_computed_tokens, strict=True))
    decoding = {
        name
        for name, sampled in zip(running.req_ids, running.num_output_tokens, strict=True)
        if sampled > 0
    }
    counts = planned.num_scheduled_tokens
    return EngineStep(
        prefill_tokens=sum(count for name, count in counts.items() if name not in decoding),
        prefill_sequences=len(counts.keys() - decoding),
        decoding_sequences=len(decoding),
        context_tokens=sum(before[name] + count for name, count in counts.items()),
    )
