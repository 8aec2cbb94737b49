"""Converts chat messages to token ids with the model's own template.

Markers that the template writes (`<|im_start|>`, one `<|image_pad|>` per image) become special
tokens. The same characters inside a question, a description or an answer are tokenised as plain
text, so a data set can neither end a turn nor refer to an image that it does not have. Other text
gets the same ids as from transformers' `apply_chat_template`.

A template is a program that comes with the model. It runs in transformers' sandbox, which denies
access to the internals of Python objects, and within a time limit, which the sandbox lacks.
"""

from __future__ import annotations

import contextlib
import re
import signal
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from megatron_sr1.data.guards import (
    MAX_JSON_BYTES,
    MAX_TEXT_CHARACTERS,
    parse_json,
    printable,
    read_file,
)
from megatron_sr1.data.prompts import ChatMessage
from megatron_sr1.errors import DataError

_DEFUSE = "\ue0de"
"""Private-use character; inserted into a special token's name, it turns the name into text."""
TEMPLATE_SECONDS = 10.0
"""Limit of processor time per rendering; usual templates take milliseconds."""
MAX_RENDERED_CHARACTERS = 4 * MAX_TEXT_CHARACTERS


class ChatTemplate:
    """The chat template and tokenizer of a model directory."""

    def __init__(self, directory: Path, tokenizer: Any) -> None:
        """Read the template and the names of the special tokens.

        Args:
            directory: model directory; chat_template.json, which supports images, is preferred.
            tokenizer: a fast tokenizer of transformers.

        Raises:
            DataError: no template, or one that cannot render a question.
        """
        self._tokenizer = tokenizer
        self._directory = directory
        self._template = _read_template(directory, tokenizer)
        added = tokenizer.added_tokens_decoder
        self.special = {token.content: int(i) for i, token in added.items() if token.special}
        names = sorted(self.special, key=len, reverse=True)
        self._pattern = re.compile(f"({'|'.join(map(re.escape, names))})")
        self._render([{"role": "user", "content": [{"type": "text", "text": "?"}]}], generate=True)

    def prompt_ids(self, messages: Sequence[ChatMessage]) -> tuple[int, ...]:
        """Return the ids up to the start of the assistant's turn, one pad id per image."""
        return self._encode(self._render(messages, generate=True))

    def turn_ids(
        self, messages: Sequence[ChatMessage], where: str
    ) -> list[tuple[tuple[int, ...], bool]]:
        """Tokenise a conversation in pieces, split before and after each assistant turn's text.

        Each piece is tokenised on its own, as the engine samples a response after its prompt.

        Args:
            messages: at least one assistant turn; turns after the last one are ignored.
            where: names the sample in errors.

        Returns:
            (ids, whether the assistant wrote them) per piece; the assistant's pieces include the
            end of turn and what the template writes after it.

        Raises:
            DataError: no assistant turn, or a template that rewrites earlier turns.
        """
        pieces: list[tuple[tuple[int, ...], bool]] = []
        done = ""
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self._render(messages[:number], generate=True)
            whole = self._render(messages[: number + 1], generate=False)
            if not prompt.startswith(done) or not whole.startswith(prompt):
                raise DataError(
                    f"{where}: the chat template renders earlier turns differently later on; split "
                    "the conversation into samples with one assistant turn each"
                )
            pieces.append((self._encode(prompt[len(done) :]), False))
            pieces.append((self._encode(whole[len(prompt) :]), True))
            done = whole
        if not pieces:
            raise DataError(f"{where}: no assistant turn; supervised samples need one to imitate")
        return pieces

    def _render(self, messages: Sequence[ChatMessage], generate: bool) -> str:
        """Render the messages; special tokens inside their text are defused."""
        try:
            with _time_limit(TEMPLATE_SECONDS):
                text = self._tokenizer.apply_chat_template(
                    [self._defused(m) for m in messages],
                    chat_template=self._template,
                    tokenize=False,
                    add_generation_prompt=generate,
                )
        except Exception as error:  # a template can raise anything, as can the sandbox
            reason = printable(f"{type(error).__name__}: {error}")[:200]
            raise DataError(f"{self._directory}: the chat template fails: {reason}") from None
        if len(text) > MAX_RENDERED_CHARACTERS:
            raise DataError(
                f"{self._directory}: the chat template writes {len(text)} characters; the limit is "
                f"{MAX_RENDERED_CHARACTERS}"
            )
        return text

    def _defused(self, message: ChatMessage) -> ChatMessage:
        parts = [
            {"type": "text", "text": self._defuse(p["text"])} if p["type"] == "text" else p
            for p in message["content"]
        ]
        if all(p["type"] == "text" for p in parts):  # some templates only support strings
            return {"role": message["role"], "content": "".join(p["text"] for p in parts)}
        return {"role": message["role"], "content": parts}

    def _defuse(self, text: str) -> str:
        text = text.replace(_DEFUSE, "")
        return self._pattern.sub(lambda found: found[0][0] + _DEFUSE + found[0][1:], text)

    def _encode(self, text: str) -> tuple[int, ...]:
        """Tokenise rendered text: special tokens where the template wrote them, else as text."""
        pieces = self._pattern.split(text)
        plain = [piece.replace(_DEFUSE, "") for piece in pieces[::2]]
        encoded = self._tokenizer(plain, add_special_tokens=False, split_special_tokens=True)
        ids: list[int] = []
        for number, part in enumerate(encoded["input_ids"]):
            ids += part
            if 2 * number + 1 < len(pieces):
                ids.append(self.special[pieces[2 * number + 1]])
        return tuple(ids)


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError after this much processor time, which does not depend on machine load.

    There is no limit outside the main thread, as only that one receives signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"not finished after {seconds:g} s")

    before = signal.signal(signal.SIGPROF, stop)
    left, _ = signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, left)  # the caller's own timer; 0: none
        signal.signal(signal.SIGPROF, before)


def _read_template(directory: Path, tokenizer: Any) -> str:
    path = directory / "chat_template.json"
    if path.is_file():
        value = parse_json(read_file(path, MAX_JSON_BYTES, str(directory)), str(path))
        if not isinstance(value, dict) or not isinstance(value.get("chat_template"), str):
            raise DataError(f"{path}: expected an object with the text chat_template")
        return value["chat_template"]
    if not tokenizer.chat_template:
        raise DataError(
            f"{directory}: no chat template (chat_template.jinja, chat_template.json or in "
            "tokenizer_config.json); take the directory of an instruction-tuned model"
        )
    try:
        return tokenizer.get_chat_template()
    except ValueError as error:
        raise DataError(f"{directory}: {printable(str(error))[:200]}") from None
