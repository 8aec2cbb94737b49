"""Pass 2 of a rollout: the requests that descriptions lead to, and their results.

A description is read without the image, by one greedy answer, by m sampled ones, or by the gold
answer's logprobs, from prefill alone. Descriptions that lead to the same prompt share one reading;
the seed of a request is derived from its prompt, so it does not matter which of them closed first,
or on which replica.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

from megatron_sr1.errors import EngineError
from megatron_sr1.records import Completion, Prompt, Reading
from megatron_sr1.rollout.engine import Engine, Progress, Request

PREFIX = "reading/"
"""Prefix of the ids of pass-2 requests."""


@dataclass(frozen=True)
class Pass2:
    """Settings of pass 2.

    Attributes:
        schedule: fork | barrier.
        temperature: of sampled answers; 0 is greedy.
        max_tokens: longest answer, tokens.
        mode: generate (answers are sampled) | likelihood (the gold answer is scored).
        num_samples: answers per description, in mode generate.
        question_only: whether each question is also read without a description.
    """

    schedule: str
    temperature: float
    max_tokens: int
    mode: str = "generate"
    num_samples: int = 1
    question_only: bool = False


@dataclass(frozen=True)
class RolloutHooks:
    """What a rollout needs to know of the data set, the recipe and the run.

    Attributes:
        find_description: text of a response so far -> its description once that has closed.
        reading_prompt: prompt, description -> token ids of the pass-2 prompt.
        seed_of: seed of a pass-1 request from its example's index, its sample number and 1; of a
            pass-2 request from -1, a number derived from its prompt, and 2 upwards.
        gold_answer: prompt -> ids that lead up to its gold answer and the answer's own ids, which
            the mode likelihood scores after the pass-2 prompt; the other mode needs none.
        closing_mark: a description closes with this character; the text is searched when it comes.
    """

    find_description: Callable[[str], str | None]
    reading_prompt: Callable[[Prompt, str], tuple[int, ...]]
    seed_of: Callable[[int, int, int], int]
    gold_answer: Callable[[Prompt], tuple[tuple[int, ...], tuple[int, ...]]] | None = None
    closing_mark: str = ">"


class Readings:
    """Creates pass-2 requests, one set per distinct prompt, and collects their completions."""

    def __init__(self, engine: Engine, pass2: Pass2 | None, hooks: RolloutHooks) -> None:
        """Start without any request; `pass2` is None if the recipe has no pass 2."""
        self._engine, self._pass2, self._hooks = engine, pass2, hooks
        self._names: dict[tuple[int, ...], list[str]] = {}  # prompt -> ids of its requests
        self._done: dict[str, Completion] = {}

    def apply_to(self, prompt: Prompt) -> bool:
        """Return True if a prompt gets a second pass: it is enabled, and the prompt has images."""
        return self._pass2 is not None and bool(prompt.image_grid_thw)

    def check(self, prompt: Prompt, longest_description_tokens: int) -> None:
        """Raise EngineError, before sampling, if a prompt's longest reading does not fit."""
        if self._pass2 is None or not self.apply_to(prompt):
            return
        longest = len(self._hooks.reading_prompt(prompt, "")) + longest_description_tokens
        max_tokens = self._pass2.max_tokens
        if self._pass2.mode == "likelihood":
            max_tokens = sum(map(len, self._gold_answer(prompt))) + 1
        check_prompt_fits(self._engine, prompt, longest, max_tokens, "pass 2")

    def ask(self, prompt: Prompt, description: str) -> tuple[tuple[int, ...], list[Request]]:
        """Return the requests for a description ("" for the question alone).

        Returns:
            the key to pass to `result`, and the requests, none if the prompt was asked before.
        """
        assert self._pass2 is not None
        token_ids, num_scored = self._hooks.reading_prompt(prompt, description), 0
        if self._pass2.mode == "likelihood":
            lead, answer = self._gold_answer(prompt)
            token_ids, num_scored = (*token_ids, *lead, *answer), len(answer)
        if token_ids in self._names:
            return token_ids, []
        # Retokenised text can have more tokens than were sampled; the answer then gets fewer.
        max_tokens = 1 if num_scored else self._pass2.max_tokens
        max_tokens = min(max_tokens, self._engine.max_model_len - len(token_ids))
        check_prompt_fits(self._engine, prompt, len(token_ids), max(max_tokens, 1), "pass 2")
        requests = [
            Request(
                id=f"{PREFIX}{len(self._names)}.{number}",
                token_ids=token_ids,
                expanded_token_ids=token_ids,
                temperature=self._pass2.temperature,
                max_tokens=max_tokens,
                seed=self._hooks.seed_of(-1, _digest(token_ids), 2 + number),
                with_logprobs=False,
                num_scored=num_scored,
            )
            for number in range(1 if num_scored else self._pass2.num_samples)
        ]
        self._names[token_ids] = [request.id for request in requests]
        return token_ids, requests

    def _gold_answer(self, prompt: Prompt) -> tuple[tuple[int, ...], tuple[int, ...]]:
        assert self._hooks.gold_answer is not None
        return self._hooks.gold_answer(prompt)

    def take(self, progress: Progress) -> None:
        """Store the completion of a pass-2 request if it is finished."""
        if progress.completion is not None:
            self._done[progress.id] = progress.completion

    def result(self, key: tuple[int, ...]) -> Reading:
        """Return the reading of a key; all its requests must be finished."""
        return Reading(tuple(self._done[name] for name in self._names[key]))

    @property
    def num_asked(self) -> int:
        """Number of distinct pass-2 prompts, including those of questions alone."""
        return len(self._names)

    @property
    def num_tokens(self) -> int:
        """Number of tokens sampled in pass 2."""
        return sum(len(c.token_ids) for c in self._done.values() if c.finish_reason != "given")


def check_prompt_fits(
    engine: Engine, prompt: Prompt, num_prompt: int, num_sampled: int, what: str
) -> None:
    """Raise EngineError, naming the sample, if prompt and sampled tokens exceed the length."""
    if num_prompt + num_sampled <= engine.max_model_len:
        return
    example = prompt.example
    raise EngineError(
        f"{example.shard} sample {example.key} (index {example.index}): {what} can take "
        f"{num_prompt} prompt tokens and {num_sampled} sampled ones, which exceeds the engine's "
        f"{engine.max_model_len}; raise rollout.max_model_len or lower the token limits"
    )


def _digest(token_ids: tuple[int, ...]) -> int:
    """Return a hash of a prompt in [0, 2**31)."""
    text = ",".join(map(str, token_ids)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "big") >> 1
