"""Ask a chat model behind an OpenAI-compatible endpoint: concurrently, and in bounded time.

In: requests of one thread. Out: for each a reply, or why there is none. What an endpoint does or
sends never raises and never hangs: the openai client retries what may pass, and each request has
one limit over all attempts, at which it is cancelled, however slowly bytes still arrive.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import re
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from megatron_sr1.config.endpoint import EndpointConfig
from megatron_sr1.errors import ConfigError

log = logging.getLogger(__name__)
FAILURES_IN_A_ROW = 20
"""After so many failed requests, without a success between them, the rest of a batch fails."""
PHASE_SHARE = 0.9
"""Of the deadline of a phase, what the requests of a batch may take."""
LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")
MAX_SHOWN_CHARACTERS = 160
CLOSING_SECONDS = 5.0
_CONTROL = re.compile(r"(?<=<)(?=\||/?s>|</?SYS|(?:start|end)_of_turn>)|(?<=\[)(?=/?INST\])")
"""The place after the first character of what common chat templates write between turns."""


@dataclass(frozen=True)
class ChatRequest:
    """What a model is asked.

    Attributes:
        messages: pairs of role and text.
        temperature: 0 is greedy; None: the endpoint's own.
        seed: of sampling; None: none is sent.
        schema: JSON schema that the reply's text must follow; None: free text.
    """

    messages: tuple[tuple[str, str], ...]
    max_tokens: int
    temperature: float | None = 0.0
    seed: int | None = None
    schema: Mapping[str, Any] | None = None

    def body(self) -> dict[str, Any]:
        """Return the fields of the HTTP request, without the name of the model."""
        turns = [{"role": role, "content": text} for role, text in self.messages]
        found = {"messages": turns, "max_completion_tokens": self.max_tokens}
        found |= {} if self.temperature is None else {"temperature": self.temperature}
        found |= {} if self.seed is None else {"seed": self.seed}
        if self.schema is not None:
            form = {"name": "reply", "strict": True, "schema": dict(self.schema)}
            found["response_format"] = {"type": "json_schema", "json_schema": form}
        return found


@dataclass(frozen=True)
class ChatReply:
    """What came back.

    Attributes:
        finish_reason: as the endpoint has it: "stop", "length", …
        num_tokens: sampled tokens by the endpoint's count; 0 if it gave none.
        failure: why there is no text; "" if there is.
    """

    text: str = ""
    finish_reason: str = ""
    num_tokens: int = 0
    failure: str = ""


def read_key(key: str, endpoint: EndpointConfig) -> str:
    """Return the endpoint's API key, "" if it needs none.

    `key` names the settings in messages.

    Raises:
        ConfigError: an endpoint elsewhere has no key, or the key cannot be sent.
    """
    name = endpoint.api_key_env
    found = os.environ.get(name, "").strip() if name else ""
    if name and not found and not is_local(endpoint.base_url):
        raise ConfigError(
            f"{key}.api_key_env={name}: the environment variable is not set, and "
            f"{key}.base_url={endpoint.base_url} is not on this machine; export it, name another "
            f"one, or leave {key}.api_key_env empty for an endpoint without keys"
        )
    if not (found.isascii() and found.isprintable()):
        raise ConfigError(f"{key}.api_key_env={name}: its value has characters that no key has")
    return found


def is_local(url: str) -> bool:
    """Return True if a URL leads to this machine."""
    return (urlsplit(url).hostname or "") in LOCAL_HOSTS


class ChatClient(AbstractContextManager["ChatClient"]):
    """Sends requests to one endpoint, `concurrency` at a time, from a thread of its own."""

    def __init__(self, key: str, endpoint: EndpointConfig) -> None:
        """Connect with the first request only; `key` names the settings in messages.

        Raises:
            ConfigError: the API key is missing.
        """
        import openai

        self._name, self._endpoint = key, endpoint
        self._secret = read_key(key, endpoint)
        self._longest = (endpoint.retries + 1) * endpoint.timeout_seconds
        self._slots = asyncio.Semaphore(endpoint.concurrency)
        self._until, self._failures, self._gave_up = math.inf, 0, False
        # A proxy of the environment is not for this machine.
        http = openai.DefaultAsyncHttpxClient(trust_env=not is_local(endpoint.base_url))
        self._client = openai.AsyncOpenAI(
            base_url=endpoint.base_url,
            api_key=self._secret or "none",
            timeout=endpoint.timeout_seconds,
            max_retries=endpoint.retries,
            http_client=http,
        )
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="chat", daemon=True)
        self._thread.start()

    def begin(self, seconds: float = 0.0) -> None:
        """Start a batch, whose requests all have a reply or fail within `seconds`; 0: no limit."""
        self._until = time.monotonic() + seconds if seconds > 0 else math.inf
        self._gave_up = False

    def submit(self, request: ChatRequest) -> Future[ChatReply]:
        """Queue a request; the future never raises."""
        return asyncio.run_coroutine_threadsafe(self._ask(request), self._loop)

    async def _ask(self, request: ChatRequest) -> ChatReply:
        """Wait for a slot, then for the reply."""
        async with self._slots:
            left = self._until - time.monotonic()
            if left <= 0:
                return ChatReply(failure="no time was left to ask")
            if self._gave_up:
                return ChatReply(failure=f"not asked after {FAILURES_IN_A_ROW} failures in a row")
            reply = await self._send(request, min(self._longest, left))
        self._failures = self._failures + 1 if reply.failure else 0
        if self._failures >= FAILURES_IN_A_ROW and not self._gave_up:
            self._gave_up = True
            text = "%s: %d requests failed in a row, the last one: %s; the rest is not asked"
            log.warning(text, self._name, self._failures, reply.failure)
        return reply

    async def _send(self, request: ChatRequest, seconds: float) -> ChatReply:
        import openai

        create = self._client.chat.completions.with_raw_response.create
        try:
            async with asyncio.timeout(seconds):
                raw: Any = await create(model=self._endpoint.model, **request.body())
            return read_reply(raw.content)
        except (TimeoutError, openai.APITimeoutError):
            return ChatReply(failure="no reply within the time limit")
        except openai.APIStatusError as error:
            return ChatReply(failure=f"HTTP {error.status_code}: {self._shown(error.message)}")
        except Exception as error:  # of the network, or of what an endpoint sent
            return ChatReply(failure=f"{type(error).__name__}: {self._shown(str(error))}")

    def _shown(self, text: str) -> str:
        """Return a message in one short line without the key, which an endpoint may repeat."""
        text = text.replace(self._secret, "***") if self._secret else text
        line = " ".join(text.split())[:MAX_SHOWN_CHARACTERS]
        return line if line.isprintable() else ascii(line)[1:-1]

    def __exit__(self, *_: object) -> None:
        """Close the client."""
        self.close()

    def close(self) -> None:
        """Cancel what is in progress and stop the thread."""
        stopping = asyncio.run_coroutine_threadsafe(self._stop(), self._loop)
        stopping.result(CLOSING_SECONDS)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(CLOSING_SECONDS)
        self._loop.close()

    async def _stop(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._client.close()


def read_reply(body: bytes) -> ChatReply:
    """Return the first choice of a chat completion; anything else is a failure."""
    try:
        found = json.loads(body)
        choice = found["choices"][0]
        text, reason = choice["message"]["content"], choice.get("finish_reason")
        num_tokens = (found.get("usage") or {}).get("completion_tokens")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return ChatReply(failure="what came is no chat completion")
    if not isinstance(text, str):
        return ChatReply(failure="the reply has no text")
    return ChatReply(text, str(reason), num_tokens if isinstance(num_tokens, int) else 0)


def defused(text: str) -> str:
    """Return a text for a message, with a space in each control token of common chat templates.

    A server would read such a token in a message as its own, and end the turn there.
    """
    return _CONTROL.sub(" ", text)
