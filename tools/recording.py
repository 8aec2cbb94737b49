"""What each engine step computed: the schedule that a cost model replays.

In: an engine. Out: a record a step, read off vLLM's own scheduler, so that prefix-cache hits,
token budgets and slots are what they were.
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
        prefill_tokens: prompt tokens computed, cached ones left out.
        prefill_sequences: sequences whose prompt they are.
        decoding_sequences: sequences that gained a token behind an earlier one.
        context_tokens: tokens whose keys and values were attended to, summed over the sequences of
            the step; with those of the step itself.
    """

    prefill_tokens: int
    prefill_sequences: int
    decoding_sequences: int
    context_tokens: int


@contextmanager
def recorded(engine: Engine) -> Iterator[list[EngineStep]]:
    """Record the engine's steps while inside; steps that schedule nothing leave no record."""
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
    """A record of vLLM's SchedulerOutput."""
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
