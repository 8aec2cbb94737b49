"""Chat messages to token ids: the model's own template, tokenised once, text staying text.

What the template wrote (`<|im_start|>`, one `<|image_pad|>` an image) becomes special tokens; the
same characters inside a question, a description or an answer are tokenised as characters. So a
data set cannot end a turn or claim an image that it does not have. Text without such names gets
the same ids as from transformers' `apply_chat_template`.

A template is a program that came with the model: it runs in transformers' sandbox only, which
knows no attributes of Python's objects, and within a time limit, which the sandbox has not.
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
"""Private use: put into a special token's name, it makes it ordinary text until tokenising."""


TEMPLATE_SECONDS = 10.0
"""Of the process's time, for one rendering; a template takes milliseconds."""
MAX_RENDERED_CHARACTERS = 4 * MAX_TEXT_CHARACTERS


class ChatTemplate:
    """A model directory's chat template and tokenizer, joined."""

    def __init__(self, directory: Path, tokenizer: Any) -> None:
        """Read the template and the names of the special tokens.

        Args:
            directory: of the model; chat_template.json, which knows images, comes first.
            tokenizer: a fast tokenizer of transformers.

        Raises:
            DataError: no template there, or one that does not render a question.
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
        """Ids up to where the assistant begins, each image one pad."""
        return self._encode(self._render(messages, generate=True))

    def turn_ids(
        self, messages: Sequence[ChatMessage], where: str
    ) -> list[tuple[tuple[int, ...], bool]]:
        """Ids of a whole conversation, cut before and after each assistant turn's own text.

        Each piece is tokenised on its own, as the engine would sample it behind its prompt.

        Args:
            messages: with one assistant turn or more; what follows the last one is left out.
            where: names the sample in errors.

        Returns:
            (ids, whether the assistant wrote them); the assistant's include the turn's end and
            what the template puts behind it.

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
        """The template's text, with special tokens inside the messages' own text defused."""
        try:
            with _time_limit(TEMPLATE_SECONDS):
                text = self._tokenizer.apply_chat_template(
                    [self._defused(m) for m in messages],
                    chat_template=self._template,
                    tokenize=False,
                    add_generation_prompt=generate,
                )
        except Exception as error:  # a template may fail in any way, the sandbox's no among them
            reason = printable(f"{type(error).__name__}: {error}")[:200]
            raise DataError(f"{self._directory}: the chat template fails: {reason}") from None
        if len(text) > MAX_RENDERED_CHARACTERS:
            raise DataError(
                f"{self._directory}: the chat template writes {len(text)} characters, at most "
                f"{MAX_RENDERED_CHARACTERS}"
            )
        return text

    def _defused(self, message: ChatMessage) -> ChatMessage:
        parts = [
            {"type": "text", "text": self._defuse(p["text"])} if p["type"] == "text" else p
            for p in message["content"]
        ]
        if all(p["type"] == "text" for p in parts):  # some templates know strings only
            return {"role": message["role"], "content": "".join(p["text"] for p in parts)}
        return {"role": message["role"], "content": parts}

    def _defuse(self, text: str) -> str:
        text = text.replace(_DEFUSE, "")
        return self._pattern.sub(lambda found: found[0][0] + _DEFUSE + found[0][1:], text)

    def _encode(self, text: str) -> tuple[int, ...]:
        """Ids of a rendered text: special tokens where the template wrote them, else plain text."""
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
    """TimeoutError after so much of the process's time, which no busy machine lengthens.

    In other threads than the main one there is no limit.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"not done after {seconds:g} s")

    before = signal.signal(signal.SIGPROF, stop)
    left, _ = signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, left)  # of a caller's own limit; 0 for none
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
