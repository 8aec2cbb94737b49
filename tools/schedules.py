"""Which engine steps a schedule takes for given lengths: one pass, a barrier, or a fork.

In: jobs, a sampled response each with the reading of its description. Out: a record an engine step,
as recording.py reads them off the real engine. The rules are vLLM's (first come, first served):
running sequences first, a token each or the next piece of their prompt; then waiting ones while
slots and the step's token budget last; full blocks of a prompt that another sequence brought are
not computed again. `bench_engine.py` compares the outcome with a recorded schedule.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_sr1.records import Prompt, Rollout
from tools.recording import EngineStep

SCHEDULES = ("one", "barrier", "forked")


@dataclass(frozen=True)
class Job:
    """A response and the reading of its description.

    Attributes:
        prompt: which prompt it has; equal prompts share their blocks.
        prompt_tokens: images expanded.
        response_tokens: sampled, one or more.
        description_tokens: so many of them until the description has closed; 0: it never does.
        reading: which pass-2 prompt that leads to; equal ones are read once.
        reading_prompt_tokens: of that prompt.
        reading_tokens: sampled in pass 2, one or more.
    """

    prompt: int
    prompt_tokens: int
    response_tokens: int
    description_tokens: int
    reading: int
    reading_prompt_tokens: int
    reading_tokens: int


def jobs_of(
    rollouts: Sequence[Rollout],
    prompts: Sequence[Prompt],
    reading_prompt: Callable[[Prompt, str], tuple[int, ...]],
    find_description: Callable[[str], str | None],
    decode: Callable[[Sequence[int]], str],
) -> list[Job]:
    """The lengths of rollouts that the engine made with both passes."""
    by_index = {prompt.example.index: prompt for prompt in prompts}
    readings: dict[tuple[int, ...], int] = {}
    jobs = []
    for rollout in rollouts:
        sampled = rollout.completion.token_ids
        ids: tuple[int, ...] = ()
        closed = answer = 0
        if rollout.reading is not None:
            assert rollout.description is not None
            ids = reading_prompt(by_index[rollout.index], rollout.description)
            answer = len(rollout.reading.answers[0].token_ids)
            ends = range(1, len(sampled) + 1)
            closed = next(k for k in ends if find_description(decode(sampled[:k])) is not None)
        jobs.append(
            Job(
                prompt=rollout.index,
                prompt_tokens=len(rollout.prompt_token_ids),
                response_tokens=len(sampled),
                description_tokens=closed,
                reading=readings.setdefault(ids, len(readings)),
                reading_prompt_tokens=len(ids),
                reading_tokens=answer,
            )
        )
    return jobs


@dataclass(frozen=True)
class Limits:
    """Of the engine.

    Attributes:
        max_num_seqs: slots.
        max_step_tokens: tokens that a step may compute.
        block_tokens: tokens of a block of keys and values.
        chunked: whether a prompt may be spread over steps.
    """

    max_num_seqs: int
    max_step_tokens: int
    block_tokens: int
    chunked: bool


@dataclass
class _Sequence:
    """A sequence in the engine; `job` is None in pass 2."""

    prompt: object
    prompt_tokens: int
    response_tokens: int
    job: Job | None = None
    num_computed: int = 0
    num_sampled: int = 0


def simulate(jobs: Sequence[Job], schedule: str, limits: Limits) -> list[EngineStep]:
    """The steps that the engine makes for `jobs` under a schedule: one | barrier | forked."""
    waiting = deque(_Sequence(j.prompt, j.prompt_tokens, j.response_tokens, j) for j in jobs)
    running: list[_Sequence] = []
    held: list[_Sequence] = []
    known: set[object] = set()
    asked: set[int] = set()
    num_open, steps = len(jobs), list[EngineStep]()
    while waiting or running:
        steps.append(_step(waiting, running, known, limits))
        for sequence in running:
            job = sequence.job
            if job is None:
                continue
            num_open -= sequence.num_sampled == sequence.response_tokens
            closes = sequence.num_sampled == job.description_tokens > 0
            if closes and schedule != "one" and job.reading not in asked:
                asked.add(job.reading)
                name = ("reading", job.reading)
                held.append(_Sequence(name, job.reading_prompt_tokens, job.reading_tokens))
        running[:] = [s for s in running if s.num_sampled < s.response_tokens]
        if schedule == "forked" or num_open == 0:
            waiting += held
            held = []
    return steps


def _step(
    waiting: deque[_Sequence], running: list[_Sequence], known: set[object], limits: Limits
) -> EngineStep:
    """One engine step: moves what it takes from `waiting` to `running`, and counts."""
    budget, prefill, prefilled, decoding, context = limits.max_step_tokens, 0, 0, 0, 0

    def compute(sequence: _Sequence) -> None:
        nonlocal budget, prefill, prefilled, decoding, context
        length = sequence.prompt_tokens + sequence.num_sampled
        count = min(length - sequence.num_computed, budget)
        budget -= count
        if sequence.num_sampled:
            decoding += 1
        else:
            prefill, prefilled = prefill + count, prefilled + 1
        sequence.num_computed += count
        context += sequence.num_computed
        sequence.num_sampled += sequence.num_computed == length

    for sequence in running:
        if budget:
            compute(sequence)
    while waiting and budget and len(running) < limits.max_num_seqs:
        sequence = waiting[0]
        if sequence.prompt in known:  # the last token is computed in any case
            blocks = (sequence.prompt_tokens - 1) // limits.block_tokens
            sequence.num_computed = blocks * limits.block_tokens
        if not limits.chunked and sequence.prompt_tokens - sequence.num_computed > budget:
            break
        known.add(sequence.prompt)
        running.append(waiting.popleft())
        compute(sequence)
    return EngineStep(prefill, prefilled, decoding, context)


@dataclass(frozen=True)
class DeclaredWorkload:
    """Declared lengths of a vision-language step; log-normal ones are cut at `longest_tokens`.

    Attributes:
        image_tokens: of a prompt.
        question_tokens: of a prompt, instructions included.
        samples_per_prompt: responses that share a prompt.
        response_mean_tokens: mean of a response before the cut.
        response_sigma: of the logarithm of responses and readings.
        description_share: of a response until its description has closed.
        reading_frame_tokens: of a pass-2 prompt beside the description.
        longest_tokens: limit of both passes.
    """

    image_tokens: int = 1000
    question_tokens: int = 100
    samples_per_prompt: int = 8
    response_mean_tokens: float = 500.0
    response_sigma: float = 0.6
    description_share: float = 0.4
    reading_frame_tokens: int = 150
    longest_tokens: int = 2048

    def tail_tokens(self, quantile_sigmas: float = 2.326) -> float:
        """A high quantile of response lengths, by default the 99th percentile."""
        return self._median * math.exp(quantile_sigmas * self.response_sigma)

    @property
    def _median(self) -> float:
        return self.response_mean_tokens / math.exp(self.response_sigma**2 / 2)

    def draw(self, num_sequences: int, seed: int) -> list[Job]:
        """Jobs of a step. A reading is as long as what stands behind a description on average."""
        rng = np.random.default_rng(seed)
        spread = np.exp(self.response_sigma * rng.standard_normal((2, num_sequences)))
        means = np.array([[1.0], [1.0 - self.description_share]]) * self._median
        lengths = np.clip(np.rint(means * spread), 1, self.longest_tokens).astype(int)
        jobs = []
        for number, (response, reading) in enumerate(lengths.T.tolist()):
            description = max(1, round(self.description_share * response))
            jobs.append(
                Job(
                    prompt=number // self.samples_per_prompt,
                    prompt_tokens=self.image_tokens + self.question_tokens,
                    response_tokens=response,
                    description_tokens=description,
                    reading=number,
                    reading_prompt_tokens=description + self.reading_frame_tokens,
                    reading_tokens=reading,
                )
            )
        return jobs
