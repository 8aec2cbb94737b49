"""A step's rollouts: pass 1 sees the image, pass 2 only the description and the question.

Source: the two passes of Vision-SR1 (arXiv 2508.19652), which rewards a description if it alone
leads to the answer. Both passes share one engine loop. With the schedule `fork`, pass 2 of a sample
starts when its description closes, while this and other samples are still decoding; with `barrier`,
it starts after the last response of pass 1. Each request carries its seed, so both schedules sample
the same tokens. A closing tag may share a token with its neighbours, so it is searched in the text.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_sr1.records import Completion, Prompt, Rollout
from megatron_sr1.rollout.engine import Engine, Progress, Request
from megatron_sr1.rollout.pass2 import PREFIX, Pass2, Readings, RolloutHooks, check_prompt_fits


@dataclass(frozen=True)
class RolloutStats:
    """Cost of a `roll_out` call on this replica.

    Attributes:
        seconds: wall time.
        pass2_only_seconds: part of it in which only pass-2 requests were live.
        pass1_tokens, pass2_tokens: sampled tokens.
        truncated: pass-1 responses that reached their token limit.
        num_pass2: rollouts whose description was read.
        num_prompts2: distinct pass-2 prompts, including those of questions alone.
    """

    engine_steps: int
    seconds: float
    pass2_only_seconds: float
    pass1_tokens: int
    pass2_tokens: int
    truncated: int
    num_pass2: int
    num_prompts2: int


@dataclass
class _Sample:
    """A rollout in progress."""

    prompt: Prompt
    number: int
    num_seen: int = 0
    completion: Completion | None = None
    description: str | None = None
    key: tuple[int, ...] | None = None
    question_key: tuple[int, ...] | None = None


def roll_out(
    engine: Engine,
    prompts: Sequence[Prompt],
    *,
    samples_per_prompt: int,
    temperature: float,
    max_response_tokens: int,
    pass2: Pass2 | None,
    hooks: RolloutHooks,
) -> tuple[list[Rollout], RolloutStats]:
    """Sample both passes of this replica's prompts.

    Args:
        engine: must be awake.
        prompts: this replica's prompts, the same on each of its ranks.
        samples_per_prompt: responses per prompt (n).
        temperature: of pass 1; 0 is greedy.
        max_response_tokens: token limit of pass 1.
        pass2: None for recipes without it; text-only samples skip it in any case.
        hooks: the recipe's tags and prompts, and the run's seeds.

    Returns:
        rollouts, ordered by prompt and then by sample, and their cost.

    Raises:
        EngineError: a prompt and its token limits exceed the engine's length; names the sample.
    """
    started, steps_before, pass2_only = time.perf_counter(), engine.num_steps, 0.0
    readings = Readings(engine, pass2, hooks)
    samples = {
        f"{position}.{number}": _Sample(prompt, number)
        for position, prompt in enumerate(prompts)
        for number in range(samples_per_prompt)
    }
    for prompt in prompts:
        check_prompt_fits(engine, prompt, len(prompt.token_ids), max_response_tokens, "pass 1")
        readings.check(prompt, max_response_tokens)
    first = [
        Request(
            id=name,
            token_ids=s.prompt.engine_token_ids,
            expanded_token_ids=s.prompt.token_ids,
            images=s.prompt.images,
            temperature=temperature,
            max_tokens=max_response_tokens,
            seed=hooks.seed_of(s.prompt.example.index, s.number, 1),
            watched=readings.apply_to(s.prompt),
        )
        for name, s in samples.items()
    ]
    engine.submit(first)
    num_open, ready = len(first), list[Request]()
    if pass2 is not None and pass2.question_only:
        for sample in samples.values():
            if readings.apply_to(sample.prompt):
                sample.question_key, requests = readings.ask(sample.prompt, "")
                ready += requests
    while engine.num_live:
        step_started, alone = time.perf_counter(), num_open == 0
        for progress in engine.step():
            if progress.id.startswith(PREFIX):
                readings.take(progress)
                continue
            sample = samples[progress.id]
            if _has_closed(sample, progress, engine, readings, hooks):
                assert sample.description is not None
                sample.key, requests = readings.ask(sample.prompt, sample.description)
                ready += requests
            if progress.completion is not None:
                sample.completion = progress.completion
                num_open -= 1
        if pass2 is not None and (pass2.schedule == "fork" or num_open == 0):
            engine.submit(ready)
            ready = []
        if alone:
            pass2_only += time.perf_counter() - step_started
    rollouts = [_rollout(s, readings, hooks, engine.weight_version) for s in samples.values()]
    completions = [r.completion for r in rollouts]
    stats = RolloutStats(
        engine_steps=engine.num_steps - steps_before,
        seconds=time.perf_counter() - started,
        pass2_only_seconds=pass2_only,
        pass1_tokens=sum(len(c.token_ids) for c in completions),
        pass2_tokens=readings.num_tokens,
        truncated=sum(c.finish_reason == "length" for c in completions),
        num_pass2=sum(r.reading is not None for r in rollouts),
        num_prompts2=readings.num_asked,
    )
    return rollouts, stats


def _has_closed(
    sample: _Sample,
    progress: Progress,
    engine: Engine,
    readings: Readings,
    hooks: RolloutHooks,
) -> bool:
    """Return True if the new tokens close the description, and store it in the sample."""
    if sample.description is not None or not readings.apply_to(sample.prompt):
        return False
    new = progress.token_ids[sample.num_seen :]
    sample.num_seen += len(new)
    if any(hooks.closing_mark in engine.piece(token) for token in new):
        sample.description = hooks.find_description(engine.decode(progress.token_ids))
    return sample.description is not None


def _rollout(
    sample: _Sample, readings: Readings, hooks: RolloutHooks, weight_version: int
) -> Rollout:
    assert sample.completion is not None
    description = sample.description
    if description is None:
        description = hooks.find_description(sample.completion.text)
    return Rollout(
        index=sample.prompt.example.index,
        sample=sample.number,
        prompt_token_ids=sample.prompt.token_ids,
        completion=sample.completion,
        description=description,
        reading=None if sample.key is None else readings.result(sample.key),
        weight_version=weight_version,
        question_only=None if sample.question_key is None else readings.result(sample.question_key),
    )
