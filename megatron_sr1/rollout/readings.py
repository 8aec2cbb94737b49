"""Pass 2 of a step: the requests that read descriptions, one set per distinct prompt.

A description is read by one greedy answer, by m sampled ones, or by the gold answer's logprobs,
from prefill alone. With `rollout.pass2_mode=endpoint` the answers are those of another model: the
replica's leader asks for them, as soon as a description closes, while the engine samples. A reading
that fails, or comes too late, says so; the grader leaves its prompt out, as for an answer that met
a limit.

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
    """What a rollout needs of the data set, the recipe and the run.

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
        finished: called after an engine step with the rollouts that it completed, readings
            included.
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


@dataclass
class Sample:
    """A rollout in progress."""

    prompt: Prompt
    number: int
    completion: Completion | None = None
    description: str | None = None
    key: Key | None = None
    question_key: Key | None = None
    rollout: Rollout | None = None


class Readings:
    """Pass-2 requests, one set per distinct prompt, and their results."""

    def __init__(self, engine: Engine, rollout: RolloutConfig, hooks: RolloutHooks) -> None:
        """Start without any request."""
        self._engine, self._rollout, self._hooks = engine, rollout, hooks
        self.names: dict[Key, list[str]] = {}  # ids of each prompt's requests
        self.done: dict[str, Completion] = {}  # by the id of the request
        self._asked: dict[str, Future[ChatReply]] = {}  # at the endpoint, by the same
        self._arrived: deque[str] = deque()  # of those, answered and not taken
        self._readers: dict[Key, list[Sample]] = {}  # samples that wait for a prompt's readings
        self._waiting: dict[str, list[Sample]] = {}  # the same lists by the id of the request

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

    def wait_for(self, key: Key | None, sample: Sample) -> None:
        """Have `take` return a sample when a reading of this key is there."""
        if key is not None:
            self._readers[key].append(sample)

    def take(self, name: str, answer: Completion) -> list[Sample]:
        """Keep the result of a request, and return the samples that wait for it."""
        self.done[name] = answer
        return self._waiting[name]

    def take_arrived(self) -> list[Sample]:
        """Keep what the endpoint has answered, and return the samples that wait for it."""
        arrived = [self._arrived.popleft() for _ in range(len(self._arrived))]
        return [sample for name in arrived for sample in self._take_reply(name)]

    def wait(self) -> tuple[list[Sample], float]:
        """Wait for the endpoint's answers, which come or fail within the client's limits.

        Returns:
            the samples that waited for them, and the seconds that it took.
        """
        started, names = time.perf_counter(), list(self._asked)
        touched = [sample for name in names for sample in self._take_reply(name)]
        return touched, time.perf_counter() - started if names else 0.0

    def _take_reply(self, name: str) -> list[Sample]:
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


def _named(prompt: Prompt, which: str) -> str:
    """Name a pass over a sample for messages."""
    return f"{prompt.example.where} (index {prompt.example.index}): {which}"


def _digest(prompt: bytes) -> int:
    """Return a hash of a prompt in [0, 2**31)."""
    return int.from_bytes(hashlib.blake2b(prompt, digest_size=4).digest(), "big") >> 1
