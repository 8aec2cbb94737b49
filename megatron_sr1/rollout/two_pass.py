"""A step's rollouts: pass 1 sees the image, pass 2 only the description and the question.

In: prompts, and three functions that are handed in: where the description is in a text, what the
pass-2 prompt for it is, and the seed of each request. Out: rollouts and what they cost.

Source: the two passes of Vision-SR1 (arXiv 2508.19652), a description's reward being whether it
alone leads to the answer. Here, both passes share one engine loop: with the schedule `fork` the
second pass of a sample starts when its description closes, while it and others still decode; with
`barrier` all wait for the last of pass 1. Each request brings its seed, so both give the same
tokens. A closing tag may share a token with its neighbours: it is looked for in the text.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_sr1.errors import EngineError
from megatron_sr1.records import Completion, Prompt, Rollout
from megatron_sr1.rollout.engine import Engine
from megatron_sr1.rollout.requests import Progress, Request


@dataclass(frozen=True)
class Pass2:
    """How pass 2 is sampled.

    Attributes:
        schedule: fork | barrier.
        temperature: 0 is greedy.
        max_tokens: longest answer, tokens.
    """

    schedule: str
    temperature: float
    max_tokens: int


@dataclass(frozen=True)
class RolloutStats:
    """What a call of `roll_out` cost on this replica.

    Attributes:
        engine_steps: steps of the engine.
        seconds: wall time.
        pass2_only_seconds: part of it in which only pass-2 requests were live.
        pass1_tokens: sampled.
        pass2_tokens: sampled.
        truncated: pass-1 responses cut by their limit.
        num_pass2: descriptions that were read.
    """

    engine_steps: int
    seconds: float
    pass2_only_seconds: float
    pass1_tokens: int
    pass2_tokens: int
    truncated: int
    num_pass2: int


@dataclass
class _Sample:
    """A rollout in the making."""

    prompt: Prompt
    number: int
    num_seen: int = 0
    completion: Completion | None = None
    description: str | None = None
    reading: Completion | None = None


def roll_out(
    engine: Engine,
    prompts: Sequence[Prompt],
    *,
    samples_per_prompt: int,
    temperature: float,
    max_response_tokens: int,
    pass2: Pass2 | None,
    find_description: Callable[[str], str | None],
    reading_prompt: Callable[[Prompt, str], tuple[int, ...]],
    seed_of: Callable[[int, int, int], int],
    closing_mark: str = ">",
) -> tuple[list[Rollout], RolloutStats]:
    """Sample both passes of this replica's prompts.

    Args:
        engine: awake, with the weights to sample from.
        prompts: of this replica, the same on each of its ranks.
        samples_per_prompt: responses a prompt (n).
        temperature: of pass 1; 0 is greedy.
        max_response_tokens: limit of pass 1.
        pass2: None for recipes without it; text-only samples have none either.
        find_description: text of a response so far -> its description once that has closed.
        reading_prompt: prompt, description -> token ids of the pass-2 prompt.
        seed_of: index of the example, number of the sample, pass (1 or 2) -> seed.
        closing_mark: a description closes with this character; the text is searched when it comes.

    Returns:
        rollouts, ordered by prompt and then by sample, and their cost.

    Raises:
        EngineError: a prompt and its limits are longer than the engine's length; names the sample.
    """
    started, steps_before, pass2_only = time.perf_counter(), engine.num_steps, 0.0
    readings = _Readings(engine, pass2, find_description, reading_prompt, seed_of, closing_mark)
    samples = {
        f"{position}.{number}": _Sample(prompt, number)
        for position, prompt in enumerate(prompts)
        for number in range(samples_per_prompt)
    }
    for prompt in prompts:
        _check_length(engine, prompt, len(prompt.token_ids), max_response_tokens, "pass 1")
        readings.check(prompt, max_response_tokens)
    first = [
        Request(
            id=name,
            token_ids=sample.prompt.engine_token_ids,
            expanded_token_ids=sample.prompt.token_ids,
            images=sample.prompt.images,
            temperature=temperature,
            max_tokens=max_response_tokens,
            seed=seed_of(sample.prompt.example.index, sample.number, 1),
            watched=readings.apply_to(sample.prompt),
        )
        for name, sample in samples.items()
    ]
    engine.submit(first)
    num_open, ready = len(first), list[Request]()
    while engine.num_live:
        step_started, alone = time.perf_counter(), num_open == 0
        for progress in engine.step():
            name, _, is_reading = progress.id.partition("/")
            sample = samples[name]
            if is_reading:
                sample.reading = progress.completion
                continue
            ready += readings.requests(sample, progress)
            if progress.completion is not None:
                sample.completion = progress.completion
                num_open -= 1
        if pass2 is not None and (pass2.schedule == "fork" or num_open == 0):
            engine.submit(ready)
            ready = []
        if alone:
            pass2_only += time.perf_counter() - step_started
    rollouts = [_rollout(s, find_description, engine.weight_version) for s in samples.values()]
    seconds, steps = time.perf_counter() - started, engine.num_steps - steps_before
    return rollouts, _stats(rollouts, steps, seconds, pass2_only)


class _Readings:
    """Makes the pass-2 request of a sample when its description has closed."""

    def __init__(
        self,
        engine: Engine,
        pass2: Pass2 | None,
        find_description: Callable[[str], str | None],
        reading_prompt: Callable[[Prompt, str], tuple[int, ...]],
        seed_of: Callable[[int, int, int], int],
        closing_mark: str,
    ) -> None:
        self._engine, self._pass2, self._closing_mark = engine, pass2, closing_mark
        self._find, self._reading_prompt, self._seed_of = find_description, reading_prompt, seed_of

    def apply_to(self, prompt: Prompt) -> bool:
        """Whether samples of a prompt are read: there is a pass 2 and there are images."""
        return self._pass2 is not None and bool(prompt.image_grid_thw)

    def check(self, prompt: Prompt, max_response_tokens: int) -> None:
        """Refuse, before anything is sampled, a prompt whose longest reading does not fit."""
        if self._pass2 is None or not self.apply_to(prompt):
            return
        longest = len(self._reading_prompt(prompt, "")) + max_response_tokens
        _check_length(self._engine, prompt, longest, self._pass2.max_tokens, "pass 2")

    def requests(self, sample: _Sample, progress: Progress) -> list[Request]:
        """The pass-2 request, if these are the tokens that closed the description; else none."""
        if sample.description is not None or not self.apply_to(sample.prompt):
            return []
        new = progress.token_ids[sample.num_seen :]
        sample.num_seen += len(new)
        if not any(self._closing_mark in self._engine.piece(token) for token in new):
            return []
        sample.description = self._find(self._engine.decode(progress.token_ids))
        if sample.description is None:
            return []
        assert self._pass2 is not None
        token_ids = self._reading_prompt(sample.prompt, sample.description)
        # Text tokenised anew can take more tokens than were sampled; then the answer gets fewer.
        room = self._engine.max_model_len - len(token_ids)
        max_tokens = min(self._pass2.max_tokens, room)
        _check_length(self._engine, sample.prompt, len(token_ids), max(max_tokens, 1), "pass 2")
        request = Request(
            id=f"{progress.id}/reading",
            token_ids=token_ids,
            expanded_token_ids=token_ids,
            temperature=self._pass2.temperature,
            max_tokens=max_tokens,
            seed=self._seed_of(sample.prompt.example.index, sample.number, 2),
            with_logprobs=False,
        )
        return [request]


def _check_length(
    engine: Engine, prompt: Prompt, num_prompt: int, num_sampled: int, what: str
) -> None:
    if num_prompt + num_sampled <= engine.max_model_len:
        return
    example = prompt.example
    raise EngineError(
        f"{example.shard} sample {example.key} (index {example.index}): {what} can take "
        f"{num_prompt} prompt tokens and {num_sampled} sampled ones, more than the engine's "
        f"{engine.max_model_len}; raise rollout.max_model_len or lower the token limits"
    )


def _rollout(
    sample: _Sample, find_description: Callable[[str], str | None], weight_version: int
) -> Rollout:
    assert sample.completion is not None
    description = sample.description
    if description is None:
        description = find_description(sample.completion.text)
    return Rollout(
        index=sample.prompt.example.index,
        sample=sample.number,
        prompt_token_ids=sample.prompt.token_ids,
        completion=sample.completion,
        description=description,
        reading=sample.reading,
        weight_version=weight_version,
    )


def _stats(
    rollouts: Sequence[Rollout], steps: int, seconds: float, pass2_only: float
) -> RolloutStats:
    completions = [r.completion for r in rollouts]
    readings = [r.reading for r in rollouts if r.reading is not None]
    return RolloutStats(
        engine_steps=steps,
        seconds=seconds,
        pass2_only_seconds=pass2_only,
        pass1_tokens=sum(len(c.token_ids) for c in completions),
        pass2_tokens=sum(len(c.token_ids) for c in readings),
        truncated=sum(c.finish_reason == "length" for c in completions),
        num_pass2=len(readings),
    )
