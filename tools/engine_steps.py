"""Engine steps of a schedule: recorded from the real engine, simulated from lengths, and timed.

`recorded` reads each step's work off vLLM's own scheduler, so that prefix-cache hits, token budgets
and slots are the real ones. `simulate` predicts the same records from jobs (a sampled response each
with the reading of its description) under a schedule: one pass, a barrier between the passes, or a
fork. Its rules are vLLM's (first come, first served): running sequences first, a token each, or the
next piece of their prompt; then waiting ones while slots and the step's token budget last; full
blocks with which an earlier prompt also began are not computed again. bench_engine.py compares the
two.

`step_seconds` times a step on the planner's model of a GPU (planning/engine_time.py). The planner
times a mean decoding step; a recorded step has its own prompts, so each of its parts has a time:
the decoder's matrices, the output layer and attention, one after the other, plus the replica's
fixed time per step:

    matrices   max(2 N / B,  2 N tokens / F)
    output     max(2 V / B,  2 V sequences / F)
    attention  K context / B

N and V are the weights of the decoder's matrices and of the output layer, 2 bytes each, K the bytes
of a token's keys and values, B the bandwidth, F the reachable share of the peak. Left out:
attention's own operations (under 3 % of a prompt's at 1,000 tokens, and far below the time of its
traffic when decoding), activations, norms and the vision tower, which runs once per image and is
the same under every schedule.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, takewhile
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sr1.model.hf_config import HFConfig, parse_hf_config
from megatron_sr1.planning.engine_time import Replica
from megatron_sr1.records import Prompt, Rollout
from megatron_sr1.rollout.engine import Engine
from megatron_sr1.runtime.gpus import find_gpu

SCHEDULES = ("one", "barrier", "forked")
PUBLISHED = Path(__file__).resolve().parent.parent / "tests" / "published"
H100 = find_gpu("h100")


@dataclass(frozen=True)
class EngineStep:
    """The work of one engine step.

    Attributes:
        prefill_tokens: prompt tokens computed, without cached ones.
        prefill_sequences: sequences that these prompt tokens belong to.
        decoding_sequences: sequences that continued after an earlier sampled token.
        context_tokens: tokens attended to, including this step's, summed over its sequences.
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
            steps.append(_recorded_step(planned))
        return planned

    scheduler.schedule = watched
    try:
        yield steps
    finally:
        scheduler.schedule = schedule


def _recorded_step(planned: Any) -> EngineStep:
    """Convert vLLM's SchedulerOutput to a record."""
    new, running = planned.scheduled_new_reqs, planned.scheduled_cached_reqs
    before = {request.req_id: request.num_computed_tokens for request in new}
    before |= dict(zip(running.req_ids, running.num_computed_tokens, strict=True))
    sampled = zip(running.req_ids, running.num_output_tokens, strict=True)
    decoding = {name for name, count in sampled if count > 0}
    counts = planned.num_scheduled_tokens
    return EngineStep(
        prefill_tokens=sum(count for name, count in counts.items() if name not in decoding),
        prefill_sequences=len(counts.keys() - decoding),
        decoding_sequences=len(decoding),
        context_tokens=sum(before[name] + count for name, count in counts.items()),
    )


@dataclass(frozen=True)
class Job:
    """A response and the reading of its description.

    Attributes:
        prompt: number of its prompt; responses to one prompt share its blocks.
        prompt_tokens: length of the prompt, images expanded.
        response_tokens: sampled tokens, one or more.
        description_tokens: sampled tokens until the description closes; 0 if it never does.
        reading: token ids of its pass-2 prompt; equal ones are read once, and share their blocks
            with others that begin with the same ids.
        reading_tokens: tokens sampled in pass 2, one or more.
    """

    prompt: int
    prompt_tokens: int
    response_tokens: int
    description_tokens: int
    reading: tuple[int, ...]
    reading_tokens: int


def jobs_of(
    rollouts: Sequence[Rollout],
    prompts: Sequence[Prompt],
    reading_prompts: Callable[[Sequence[tuple[Prompt, str]]], list[tuple[int, ...]]],
    find_description: Callable[[str], str | None],
    decode: Callable[[Sequence[int]], str],
) -> list[Job]:
    """Return the lengths of rollouts that the engine made with both passes."""
    by_index = {prompt.example.index: prompt for prompt in prompts}
    jobs = []
    for rollout in rollouts:
        sampled = rollout.completion.token_ids
        ids: tuple[int, ...] = ()
        closed = answer = 0
        if rollout.reading is not None:
            assert rollout.description is not None
            asked = by_index[rollout.index], rollout.description
            (ids,) = reading_prompts([asked])
            answer = len(rollout.reading.answers[0].token_ids)
            ends = range(1, len(sampled) + 1)
            closed = next(k for k in ends if find_description(decode(sampled[:k])) is not None)
        jobs.append(
            Job(
                prompt=rollout.index,
                prompt_tokens=len(rollout.prompt_token_ids),
                response_tokens=len(sampled),
                description_tokens=closed,
                reading=ids,
                reading_tokens=answer,
            )
        )
    return jobs


@dataclass(frozen=True)
class Limits:
    """Limits of the engine; `chunked` if a prompt may be spread over steps.

    `max_step_tokens` is what a step may compute, `block_tokens` a block of keys and values.
    """

    max_num_seqs: int
    max_step_tokens: int
    block_tokens: int
    chunked: bool


@dataclass
class _Sequence:
    """A sequence in the engine; `job` is None in pass 2.

    A prompt of pass 1 consists of one id that is unique to it and beyond any vocabulary.
    """

    prompt: tuple[int, ...]
    response_tokens: int
    job: Job | None = None
    num_computed: int = 0
    num_sampled: int = 0


def simulate(jobs: Sequence[Job], schedule: str, limits: Limits) -> list[EngineStep]:
    """Return the steps that the engine makes for `jobs` under a schedule."""
    first = [(2**32 + job.prompt,) * job.prompt_tokens for job in jobs]
    sequences = zip(first, jobs, strict=True)
    waiting = deque(_Sequence(prompt, job.response_tokens, job) for prompt, job in sequences)
    running: list[_Sequence] = []
    held: list[_Sequence] = []
    known: set[int] = set()
    requested: set[tuple[int, ...]] = set()
    num_open, steps = len(jobs), list[EngineStep]()
    while waiting or running:
        steps.append(_simulated_step(waiting, running, known, limits))
        for sequence in running:
            job = sequence.job
            if job is None:
                continue
            num_open -= sequence.num_sampled == sequence.response_tokens
            closes = sequence.num_sampled == job.description_tokens > 0
            if closes and schedule != "one" and job.reading not in requested:
                requested.add(job.reading)
                held.append(_Sequence(job.reading, job.reading_tokens))
        running[:] = [s for s in running if s.num_sampled < s.response_tokens]
        if schedule == "forked" or num_open == 0:
            waiting += held
            held = []
    return steps


def _simulated_step(
    waiting: deque[_Sequence], running: list[_Sequence], known: set[int], limits: Limits
) -> EngineStep:
    """Move the sequences that the next step admits to `running`; return the step's work.

    `known` contains the hashes of the blocks of admitted prompts, as `_block_ends` returns them.
    """
    budget, prefill, prefilled, decoding, context = limits.max_step_tokens, 0, 0, 0, 0

    def compute(sequence: _Sequence) -> None:
        nonlocal budget, prefill, prefilled, decoding, context
        length = len(sequence.prompt) + sequence.num_sampled
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
        blocks = _block_ends(sequence.prompt, limits.block_tokens)
        shared = sum(takewhile(bool, (block in known for block in blocks))) * limits.block_tokens
        if shared == len(sequence.prompt):  # the last token is computed in any case
            shared -= limits.block_tokens
        sequence.num_computed = shared
        if not limits.chunked and len(sequence.prompt) - shared > budget:
            break
        known.update(blocks)
        running.append(waiting.popleft())
        compute(sequence)
    return EngineStep(prefill, prefilled, decoding, context)


def _block_ends(prompt: tuple[int, ...], block_tokens: int) -> list[int]:
    """Return for each whole block of a prompt a hash of all tokens up to its end."""
    starts = range(0, len(prompt) - block_tokens + 1, block_tokens)
    blocks = (prompt[start : start + block_tokens] for start in starts)
    return list(accumulate(blocks, lambda before, block: hash((before, block)), initial=0))[1:]


@dataclass(frozen=True)
class DeclaredWorkload:
    """Declared lengths of a vision-language step; log-normal ones are cut at `longest_tokens`.

    Attributes:
        image_tokens: image tokens in a prompt.
        question_tokens: text tokens in a prompt, instructions included.
        samples_per_prompt: responses to each prompt.
        response_mean_tokens: mean length of a response before the cut.
        response_sigma: standard deviation of the logarithm of responses and readings.
        description_share: share of a response up to the end of its description.
        reading_frame_tokens: tokens of a pass-2 prompt besides the description.
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

    def draw(self, num_sequences: int, seed: int) -> list[Job]:
        """Draw the jobs of a step; a reading's mean length is that of a response's second part."""
        rng = np.random.default_rng(seed)
        median = self.response_mean_tokens / math.exp(self.response_sigma**2 / 2)
        spread = np.exp(self.response_sigma * rng.standard_normal((2, num_sequences)))
        medians = np.array([[1.0], [1.0 - self.description_share]]) * median
        lengths = np.clip(np.rint(medians * spread), 1, self.longest_tokens).astype(int)
        jobs = []
        for number, (response, reading) in enumerate(lengths.T.tolist()):
            description = max(1, round(self.description_share * response))
            jobs.append(
                Job(
                    prompt=number // self.samples_per_prompt,
                    prompt_tokens=self.image_tokens + self.question_tokens,
                    response_tokens=response,
                    description_tokens=description,
                    reading=(number,) * (description + self.reading_frame_tokens),
                    reading_tokens=reading,
                )
            )
        return jobs


def read_published(size: str) -> HFConfig:
    """Return the shape of a published model, e.g. "7b"."""
    return parse_hf_config(json.loads((PUBLISHED / f"qwen25vl_{size}.json").read_text()))


def whole_gpu(hf_config: HFConfig) -> Replica:
    """Return a bfloat16 replica that has one H100 to itself."""
    return Replica(hf_config, H100, 1, H100.memory_bytes, dtype_bytes=2, max_num_seqs=512)


def step_seconds(step: EngineStep, replica: Replica) -> float:
    """Return the time of one engine step on a replica of one rank."""
    gpu = replica.gpu
    bandwidth, flops = gpu.memory_rate, gpu.peak_flops * gpu.matmul_share

    def matrix_seconds(weights: float, rows: int) -> float:
        return max(replica.dtype_bytes * weights / bandwidth, 2 * weights * rows / flops)

    tokens = step.prefill_tokens + step.decoding_sequences
    sequences = step.prefill_sequences + step.decoding_sequences
    return (
        matrix_seconds(replica.layer_weights, tokens)
        + matrix_seconds(replica.output_weights, sequences)
        + replica.token_bytes * step.context_tokens / bandwidth
        + replica.step_overhead_seconds
    )


def replay_seconds(steps: Iterable[EngineStep], replica: Replica) -> float:
    """Return the time of a whole schedule."""
    return sum(step_seconds(step, replica) for step in steps)
