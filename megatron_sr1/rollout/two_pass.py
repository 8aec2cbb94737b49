"""A step's rollouts: pass 1 sees the image, pass 2 only the description and the question.

Source: the two passes of Vision-SR1 (arXiv 2508.19652), which rewards a description if it alone
leads to the answer. Both passes share one engine loop. With `rollout.pass2=fork`, pass 2 of a
sample starts when its description closes, while this and other samples are still decoding; with
`barrier`, it starts after the last response of pass 1. Each request carries its seed, so both
schedules sample the same tokens. A closing tag may share a token with its neighbours, so it is
searched in the text.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_sr1.config.rollout import RolloutConfig
from megatron_sr1.records import Prompt, Rollout
from megatron_sr1.rollout.engine import Engine, Request
from megatron_sr1.rollout.readings import PREFIX, Readings, RolloutHooks, Sample


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


def roll_out(
    engine: Engine, prompts: Sequence[Prompt], rollout: RolloutConfig, hooks: RolloutHooks
) -> tuple[list[Rollout], RolloutStats]:
    """Sample both passes of this replica's prompts; text-only prompts skip pass 2.

    The engine is awake; `prompts` are the same on each rank of the replica. `rollout` gives the
    number of samples, temperatures (0 is greedy), token limits and the kind of pass 2. Returns the
    rollouts, ordered by prompt and then by sample, and their cost. Raises EngineError, naming the
    sample, if a prompt and its token limits exceed the engine's length.
    """
    started, steps_before, pass2_only = time.perf_counter(), engine.num_steps, 0.0
    readings = Readings(engine, rollout, hooks)
    samples = {
        f"{position}.{number}": Sample(prompt, number)
        for position, prompt in enumerate(prompts)
        for number in range(rollout.samples_per_prompt)
    }
    readings.check(prompts)
    first = [_request(name, each, readings, rollout, hooks) for name, each in samples.items()]
    engine.submit(first)
    num_open, ready = len(first), list[Request]()

    def finish(touched: Sequence[Sample]) -> None:
        """Pass on the samples, of those of which a part has come, that are whole."""
        found = []
        for s in touched:
            is_new = s.rollout is None and s.completion is not None
            if is_new and readings.has(s.key) and readings.has(s.question_key):
                s.rollout = _rollout(s, readings, hooks, engine)
                found.append(s.rollout)
        if found and hooks.finished is not None:
            hooks.finished(found)

    if hooks.question_only:
        read = [sample for sample in samples.values() if readings.apply_to(sample.prompt)]
        keys, ready = readings.ask([(sample.prompt, "") for sample in read])
        for sample, key in zip(read, keys, strict=True):
            sample.question_key = key
            readings.wait_for(key, sample)
    while engine.num_live:
        step_started, alone = time.perf_counter(), num_open == 0
        closed, touched = list[Sample](), list[Sample]()
        for progress in engine.step():
            name, completion = progress.id, progress.completion
            if completion is None:  # it has a closing mark
                samples[name].description = hooks.find_description(progress.text)
                if samples[name].description is not None:
                    engine.unwatch(name)
                    closed.append(samples[name])
            elif name.startswith(PREFIX):
                touched += readings.take(name, completion)
            else:
                samples[name].completion = completion
                touched.append(samples[name])
                num_open -= 1
        keys, requests = readings.ask([(s.prompt, s.description or "") for s in closed])
        for sample, key in zip(closed, keys, strict=True):
            sample.key = key
            readings.wait_for(key, sample)
        ready += requests
        if rollout.pass2 == "fork" or num_open == 0:
            engine.submit(ready)
            ready = []
        finish(touched + readings.take_arrived())
        if alone:
            pass2_only += time.perf_counter() - step_started
    waited_for, seconds = readings.wait()
    finish(waited_for)
    pass2_only += seconds
    rollouts = [s.rollout for s in samples.values() if s.rollout is not None]
    assert len(rollouts) == len(samples)
    steps, seconds = engine.num_steps - steps_before, time.perf_counter() - started
    return rollouts, _stats(rollouts, readings, steps, seconds, pass2_only)


def _stats(
    rollouts: Sequence[Rollout], readings: Readings, steps: int, seconds: float, pass2_only: float
) -> RolloutStats:
    completions = [r.completion for r in rollouts]
    sampled = [c for c in readings.done.values() if c.finish_reason != "given"]
    return RolloutStats(
        engine_steps=steps,
        seconds=seconds,
        pass2_only_seconds=pass2_only,
        pass1_tokens=sum(len(c.token_ids) for c in completions),
        pass2_tokens=sum(len(c.token_ids) for c in sampled),
        truncated=sum(c.finish_reason == "length" for c in completions),
        num_pass2=sum(r.reading is not None for r in rollouts),
        num_prompts2=len(readings.names),
    )


def _request(
    name: str, sample: Sample, readings: Readings, rollout: RolloutConfig, hooks: RolloutHooks
) -> Request:
    """Return the request of a sample's first pass."""
    return Request(
        id=name,
        token_ids=sample.prompt.token_ids,
        vision=sample.prompt.vision,
        temperature=rollout.temperature,
        max_tokens=rollout.max_response_tokens,
        seed=hooks.seed_of(sample.prompt.example.index, sample.number, 1),
        watched_for=hooks.closing_mark if readings.apply_to(sample.prompt) else None,
    )


def _rollout(sample: Sample, readings: Readings, hooks: RolloutHooks, engine: Engine) -> Rollout:
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
        reading=readings.result(sample.key),
        weight_version=engine.weight_version,
        question_only=readings.result(sample.question_key),
        replica=engine.replica,
    )
