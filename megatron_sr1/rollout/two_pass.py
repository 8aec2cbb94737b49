"""A step's rollouts: pass 1 sees the image, pass 2 only the description and the question.

Source: the two passes of Vision-SR1 (arXiv 2508.19652), which rewards a description if it alone
leads to the answer. Both passes share one engine loop. With `rollout.pass2=fork`, pass 2 of a
sample starts when its description closes, while this and other samples are still decoding; with
`barrier`, it starts after the last response of pass 1. Each request carries its seed, so both
schedules sample the same tokens. A closing tag may share a token with its neighbours, so it is
searched in the text.

Pass 2 reads a description by one greedy answer, by m sampled ones, or by the gold answer's
logprobs, from prefill alone. With `rollout.pass2_mode=endpoint` the answers are those of another
model: the replica's leader asks for them, as soon as a description closes, while the engine
samples. A reading that fails, or comes too late, says so; the grader leaves its prompt out, as for
an answer that met a limit.

Descriptions that lead to the same prompt share one reading; the seed of a request is derived from
its prompt, so it does not matter which of them closed first, or on which replica.
"""

from __future__ import annotations

import hashlib
import json
import time
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial

from megatron_sr1.config.rollout import RolloutConfig
from megatron_sr1.records import Completion, Prompt, Reading, Rollout
from megatron_sr1.rollout.engine import Engine, Request
from megatron_sr1.runtime.chat import ChatClient, ChatReply, ChatRequest, defused

Key = tuple[int, ...] | tuple[tuple[str, str], ...]
"""A pass-2 prompt: the engine's token ids, or the endpoint's messages."""
Asked = tuple[Prompt, str]
"""What a reading is asked: a prompt's question, and a description; "" for the question alone."""
PREFIX = "reading/"
"""Prefix of the ids of pass-2 requests."""


@dataclass(frozen=True)
class RolloutHooks:
    """What a rollout needs to know of the data set, the recipe and the run.

    Attributes:
        find_description: text of a response so far -> its description once that has closed.
        reading_prompts: pairs of prompt and description -> token ids of each one's pass-2 prompt;
            None: no pass 2.
        seed_of: seed of a pass-1 request from its example's index, its sample number and 1; of a
            pass-2 request from -1, a number derived from its prompt, and 2 upwards.
        gold_answer: prompt -> ids that lead up to its gold answer and the answer's own ids, which
            `pass2_mode=likelihood` scores after the pass-2 prompt; other modes need none.
        question_only: whether each question is also read without a description.
        closing_mark: a description closes with this character; the text is searched when it comes.
        reading_messages: prompt, description -> pairs of role and text of the pass-2 prompt, for
            `pass2_mode=endpoint`.
        reader: asks the endpoint of that mode; on the replica's leader.
        finished: is passed the rollouts that are whole, readings included, after the engine step
            that finished them.
    """

    find_description: Callable[[str], str | None]
    reading_prompts: Callable[[Sequence[Asked]], list[tuple[int, ...]]] | None
    seed_of: Callable[[int, int, int], int]
    gold_answer: Callable[[Prompt], tuple[tuple[int, ...], tuple[int, ...]]] | None = None
    question_only: bool = False
    closing_mark: str = ">"
    reading_messages: Callable[[Prompt, str], tuple[tuple[str, str], ...]] | None = None
    reader: ChatClient | None = None
    finished: Callable[[Sequence[Rollout]], None] | None = None


class Readings:
    """Pass-2 requests, one set per distinct prompt, and their results."""

    def __init__(self, engine: Engine, rollout: RolloutConfig, hooks: RolloutHooks) -> None:
        """Start without any request."""
        self._engine, self._rollout, self._hooks = engine, rollout, hooks
        self.names: dict[Key, list[str]] = {}  # ids of each prompt's requests
        self.done: dict[str, Completion] = {}  # by the id of the request
        self._asked: dict[str, Future[ChatReply]] = {}  # at the endpoint, by the same
        self._arrived: deque[str] = deque()  # of those, answered and not taken
        self._readers: dict[Key, list[_Sample]] = {}  # samples that wait for a prompt's readings
        self._waiting: dict[str, list[_Sample]] = {}  # the same lists by the id of the request

    def apply_to(self, prompt: Prompt) -> bool:
        """Return True if a prompt gets a second pass: the recipe has one, the prompt has images."""
        return self._hooks.reading_prompts is not None and prompt.vision is not None

    def _compose(self, asked: Sequence[Asked]) -> list[tuple[tuple[int, ...], int, int]]:
        """Return each reading's prompt, how many ids at its end are scored, and its token limit."""
        assert self._hooks.reading_prompts is not None
        found = self._hooks.reading_prompts(asked)
        if self._rollout.pass2_mode != "likelihood":
            return [(token_ids, 0, self._rollout.max_reading_tokens) for token_ids in found]
        assert self._hooks.gold_answer is not None
        golds = [self._hooks.gold_answer(prompt) for prompt, _ in asked]
        return [
            ((*token_ids, *lead, *answer), len(answer), 1)
            for token_ids, (lead, answer) in zip(found, golds, strict=True)
        ]

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raise EngineError, before sampling, if a prompt or its longest reading does not fit."""
        longest_response = self._rollout.max_response_tokens
        for prompt in prompts:
            if not self._engine.fits(len(prompt.token_ids), longest_response):
                sizes = len(prompt.token_ids), longest_response
                raise self._engine.too_long(_named(prompt, "pass 1"), *sizes)
        asked = [(prompt, "") for prompt in prompts if self.apply_to(prompt)]
        if not asked or self._rollout.pass2_mode == "endpoint":
            return
        for (prompt, _), (token_ids, _, max_tokens) in zip(
            asked, self._compose(asked), strict=True
        ):
            longest = len(token_ids) + longest_response
            if not self._engine.fits(longest, max_tokens):
                raise self._engine.too_long(_named(prompt, "pass 2"), longest, max_tokens)

    def ask(self, asked: Sequence[Asked]) -> tuple[list[Key | None], list[Request]]:
        """Return the key of each to pass to `result`, and the engine's requests.

        There are no requests for a prompt that was asked before, or that the endpoint is asked.
        """
        if self._rollout.pass2_mode == "endpoint":
            return [self._ask_endpoint(*each) for each in asked], []
        composed = self._compose(asked) if asked else []
        new = {c[0]: (prompt, *c) for (prompt, _), c in zip(asked, composed, strict=True)}
        requests = [
            request
            for token_ids, each in new.items()
            if token_ids not in self.names
            for request in self._requests(*each)
        ]
        return [token_ids for token_ids, _, _ in composed], requests

    def _requests(
        self, prompt: Prompt, token_ids: tuple[int, ...], num_scored: int, max_tokens: int
    ) -> list[Request]:
        # Retokenised text can have more tokens than were sampled; the answer then gets fewer.
        max_tokens = min(max_tokens, self._engine.max_model_len - len(token_ids))
        if max_tokens < 1:
            raise self._engine.too_long(_named(prompt, "pass 2"), len(token_ids), 1)
        requests = [
            Request(
                id=f"{PREFIX}{len(self.names)}.{number}",
                token_ids=token_ids,
                temperature=self._rollout.pass2_temperature,
                max_tokens=max_tokens,
                seed=self._hooks.seed_of(-1, _digest(array("q", token_ids).tobytes()), 2 + number),
                with_logprobs=False,
                num_scored=num_scored,
            )
            for number in range(1 if num_scored else self._rollout.pass2_samples)
        ]
        self._name(token_ids, [request.id for request in requests])
        return requests

    def _name(self, key: Key, names: list[str]) -> None:
        self.names[key], self._readers[key] = names, []
        self._waiting |= dict.fromkeys(names, self._readers[key])

    def _ask_endpoint(self, prompt: Prompt, description: str) -> Key | None:
        """Send a reading's requests and return its key; None where another rank asks."""
        hooks, rollout = self._hooks, self._rollout
        if hooks.reader is None:
            return None
        assert hooks.reading_messages is not None
        messages = hooks.reading_messages(prompt, description)
        key = tuple((role, defused(text)) for role, text in messages)
        if key not in self.names:
            first, is_greedy = f"{PREFIX}{len(self.names)}", rollout.pass2_temperature == 0
            self._name(key, [f"{first}.{number}" for number in range(rollout.pass2_samples)])
            number_of_key = _digest(json.dumps(key).encode())
            for number, name in enumerate(self.names[key]):
                seed = None if is_greedy else hooks.seed_of(-1, number_of_key, 2 + number)
                self._asked[name] = hooks.reader.submit(
                    ChatRequest(key, rollout.max_reading_tokens, rollout.pass2_temperature, seed)
                )
                self._asked[name].add_done_callback(partial(self._answered, name))
        return key

    def _answered(self, name: str, _: object) -> None:
        self._arrived.append(name)  # in the client's thread

    def wait_for(self, key: Key | None, sample: _Sample) -> None:
        """Have `take` return a sample when a reading of this key is there."""
        if key is not None:
            self._readers[key].append(sample)

    def take(self, name: str, answer: Completion) -> list[_Sample]:
        """Keep the result of a request, and return the samples that wait for it."""
        self.done[name] = answer
        return self._waiting[name]

    def take_arrived(self) -> list[_Sample]:
        """Keep what the endpoint has answered, and return the samples that wait for it."""
        arrived = [self._arrived.popleft() for _ in range(len(self._arrived))]
        return [sample for name in arrived for sample in self._take_reply(name)]

    def wait(self) -> tuple[list[_Sample], float]:
        """Wait for the endpoint's answers, which come or fail within the client's limits.

        Returns:
            the samples that waited for them, and the seconds that it took.
        """
        started, names = time.perf_counter(), list(self._asked)
        touched = [sample for name in names for sample in self._take_reply(name)]
        return touched, time.perf_counter() - started if names else 0.0

    def _take_reply(self, name: str) -> list[_Sample]:
        reply = self._asked.pop(name).result()
        reason = "failed" if reply.failure else "length" * (reply.finish_reason == "length")
        text = reply.failure or reply.text
        return self.take(name, Completion((), (), text, reason or "stop"))

    def has(self, key: Key | None) -> bool:
        """Return True if the reading of a key is there, or there is none."""
        return key is None or all(map(self.done.__contains__, self.names[key]))

    def result(self, key: Key | None) -> Reading | None:
        """Return the reading of a key; all its requests must be finished."""
        if key is None:
            return None
        return Reading(tuple(self.done[name] for name in self.names[key]))


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
    completion: Completion | None = None
    description: str | None = None
    key: Key | None = None
    question_key: Key | None = None
    rollout: Rollout | None = None


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
        f"{position}.{number}": _Sample(prompt, number)
        for position, prompt in enumerate(prompts)
        for number in range(rollout.samples_per_prompt)
    }
    readings.check(prompts)
    first = [_request(name, each, readings, rollout, hooks) for name, each in samples.items()]
    engine.submit(first)
    num_open, ready = len(first), list[Request]()

    def finish(touched: Sequence[_Sample]) -> None:
        """Pass on the samples, of those of which a part has come, that are whole."""
        found = []
        for s in touched:
            is_new = s.rollout is None and s.completion is not None
            if is_new and readings.has(s.key) and readings.has(s.question_key):
                s.rollout = _rollout(s, readings, hooks, engine.weight_version)
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
        closed, touched = list[_Sample](), list[_Sample]()
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
    name: str, sample: _Sample, readings: Readings, rollout: RolloutConfig, hooks: RolloutHooks
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
        reading=readings.result(sample.key),
        weight_version=weight_version,
        question_only=readings.result(sample.question_key),
    )


def _named(prompt: Prompt, which: str) -> str:
    """Name a pass over a sample for messages."""
    return f"{prompt.example.where} (index {prompt.example.index}): {which}"


def _digest(prompt: bytes) -> int:
    """Return a hash of a prompt in [0, 2**31)."""
    return int.from_bytes(hashlib.blake2b(prompt, digest_size=4).digest(), "big") >> 1
