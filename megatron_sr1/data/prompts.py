"""Prompts: the messages of each pass, and their token ids by the model's own chat template.

The form (three spans, a self-contained description, a reader without the image) is that of arXiv
2508.19652, section 3; the wording is this project's own.

Markers that the template writes (`<|im_start|>`, one `<|image_pad|>` per image) become special
tokens. The same characters inside a question, a description or an answer are tokenised as plain
text, so a data set can neither end a turn nor refer to an image that it does not have. Other text
gets the same ids as from transformers' `apply_chat_template`. A template is a program that comes
with the model: it runs in transformers' sandbox, and within a time limit, which the sandbox lacks.
"""

from __future__ import annotations

import contextlib
import re
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from megatron_sr1.data.examples import ESCAPED_MARK, IMAGE_MARK, escape_marks, split_at_marks
from megatron_sr1.data.guards import MAX_TEXT_CHARACTERS, printable, read_json
from megatron_sr1.errors import DataError
from megatron_sr1.records import Example, Message

ChatMessage = dict[str, Any]
"""{"role": str, "content": [{"type": "text", "text": str} | {"type": "image"}, …]}"""
_DEFUSE = "\ue0de"
"""Private-use character; inserted into a special token's name, it turns the name into text."""
TEMPLATE_SECONDS = 10.0
"""Limit of processor time per rendering; usual templates take milliseconds."""
MAX_RENDERED_CHARACTERS = 4 * MAX_TEXT_CHARACTERS
_DESCRIBE = (
    "Work in three parts and write nothing outside them. First, between <description> and "
    "</description>, put down everything in the image that bears on the question: objects, "
    "text, numbers, positions and relations, so complete that somebody who never sees the image "
    "could settle the question from your words; do not solve it there. Next, between <think> and "
    "</think>, reason step by step. Last, give the final answer alone in \\boxed{}."
)
_THINK = (
    "First reason step by step between <think> and </think>. Then give the final answer alone in "
    "\\boxed{}, and nothing after it."
)
_READ = (
    "The image is not available to you. What it shows is told in the description; rely on that "
    "alone. "
)
_BRIEF = "Describe, think, answer."
PASS1_INSTRUCTIONS: Mapping[str, Mapping[str, str]] = {
    "full": {"vision_sr1": _DESCRIBE, "see_think": _DESCRIBE, "vision_r1": _THINK},
    "brief": {"vision_sr1": _BRIEF, "see_think": _BRIEF, "vision_r1": "Think, answer."},
}
"""By style and recipe: `full` for published models, `brief` for a model trained with it."""
PASS2_TEMPLATES: Mapping[str, Mapping[str, tuple[str, str, str]]] = {
    "full": {
        "question_first": (
            f"{_READ}{_THINK}\n\nQuestion about an image:\n",
            "\n\nDescription of the image:\n",
            "",
        ),
        "description_first": (
            "Description of an image:\n",
            "\n\nQuestion about the image:\n",
            f"\n\n{_READ}{_THINK}",
        ),
    },
    "brief": {
        "question_first": ("Think, answer.\n", "\nRead: ", ""),
        "description_first": ("Read: ", "\n", "\nThink, answer."),
    },
}
"""By style and order: the text before, between and after the question and the description."""


def pass1_messages(example: Example, recipe: str, style: str = "full") -> list[ChatMessage]:
    """Return the chat messages of pass 1: the turns up to the last user turn, then the instruction.

    `recipe` and `style` are keys of `PASS1_INSTRUCTIONS`.

    Raises:
        DataError: there are image marks after the last user turn.
    """
    gap = "\n" if style == "brief" else "\n\n"
    last = max(i for i, m in enumerate(example.messages) if m.role == "user")
    asked = example.messages[last].content.rstrip()
    turn = Message("user", f"{asked}{gap}{PASS1_INSTRUCTIONS[style][recipe]}")
    messages = chat_messages([*example.messages[:last], turn])
    found = sum(part["type"] == "image" for m in messages for part in m["content"])
    if found != example.num_images:
        raise DataError(
            f"{found} {IMAGE_MARK} marks up to the last user turn, {example.num_images} images; "
            "images of later turns cannot be asked about"
        )
    return messages


def pass2_messages(
    question: str, description: str, style: str = "full", order: str = "question_first"
) -> list[ChatMessage]:
    """Return the chat messages of pass 2: one user turn with one text part.

    Image marks of the question are removed; `<image>` in the description stays text. `style` and
    `order` are keys of `PASS2_TEMPLATES`: question_first lets the engine's prefix cache serve what
    the descriptions of a prompt share, description_first is that of arXiv 2508.19652.
    """
    before, between, after = PASS2_TEMPLATES[style][order]
    parts = [strip_image_marks(question), description.strip()]
    first, second = parts if order == "question_first" else reversed(parts)
    text = f"{before}{first}{between}{second}{after}"
    return [{"role": "user", "content": [{"type": "text", "text": text}]}]


def chat_messages(turns: Sequence[Message]) -> list[ChatMessage]:
    """Convert turns with `<image>` marks to chat messages with image parts."""
    messages = []
    for turn in turns:
        parts: list[dict[str, str]] = []
        for text in split_at_marks(turn):
            parts += [{"type": "image"}, {"type": "text", "text": text}]
        content = [part for part in parts[1:] if part.get("text") != ""]
        messages.append({"role": turn.role, "content": content})
    return messages


def strip_image_marks(question: str) -> str:
    """Remove image marks and the blanks around them from a question, and resolve escapes."""
    mark = rf"(?:{re.escape(IMAGE_MARK)}[ \t]*)+"
    without = re.sub(rf"(?m)^[ \t]*{mark}\n?", "", question)
    # Match only at the start of a run of blanks or backslashes: trying each is quadratic.
    before = r"(?:(?<![ \t])[ \t]+|(?<![ \t\\])((?:\\\\)*))"
    without = re.sub(before + mark, lambda found: f"{found[1] or ''} ", without)
    return without.replace(ESCAPED_MARK, IMAGE_MARK).strip()


def flat_text(message: ChatMessage) -> str:
    """Join a chat message to one text with `<image>` marks, the inverse of `chat_messages`."""
    escaped = str if message["role"] == "assistant" else escape_marks
    parts = message["content"]
    return "".join(IMAGE_MARK if p["type"] == "image" else escaped(p["text"]) for p in parts)


class ChatTemplate:
    """The chat template and tokenizer of a model directory."""

    def __init__(self, directory: Path, tokenizer: Any) -> None:
        """Read the template and transformers' fast tokenizer; render a question as a check."""
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

    def turn_ids(self, messages: Sequence[ChatMessage]) -> list[tuple[tuple[int, ...], bool]]:
        """Tokenise a conversation in pieces, split before and after each assistant turn's text.

        Each piece is tokenised on its own, as the engine samples a response after its prompt; turns
        after the last assistant turn are ignored. Returns (ids, whether the assistant wrote them)
        per piece; the assistant's include the end of turn and what the template writes after it.

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
                    "the chat template renders earlier turns differently later on; split the "
                    "conversation into samples with one assistant turn each"
                )
            pieces.append((self._encode(prompt[len(done) :]), False))
            pieces.append((self._encode(whole[len(prompt) :]), True))
            done = whole
        if not pieces:
            raise DataError("no assistant turn; supervised samples need one to imitate")
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
            reason = printable(f"{type(error).__name__}: {error}")
            raise DataError(f"{self._directory}: the chat template fails: {reason}") from None
        if len(text) > MAX_RENDERED_CHARACTERS:
            limit = f"{len(text)} characters; the limit is {MAX_RENDERED_CHARACTERS}"
            raise DataError(f"{self._directory}: the chat template writes {limit}")
        return text

    def _defused(self, message: ChatMessage) -> ChatMessage:
        parts = [dict(part) for part in message["content"]]
        for part in parts:
            if part["type"] == "text":
                text = part["text"].replace(_DEFUSE, "")
                part["text"] = self._pattern.sub(lambda m: m[0][0] + _DEFUSE + m[0][1:], text)
        if all(p["type"] == "text" for p in parts):  # some templates only support strings
            return {"role": message["role"], "content": "".join(p["text"] for p in parts)}
        return {"role": message["role"], "content": parts}

    def _encode(self, text: str) -> tuple[int, ...]:
        """Tokenise rendered text: special tokens where the template wrote them, else as text."""
        pieces = self._pattern.split(text)
        plain = [piece.replace(_DEFUSE, "") for piece in pieces[::2]]
        encoded = self._tokenizer(plain, add_special_tokens=False, split_special_tokens=True)
        ids = list(encoded["input_ids"][0])
        for piece, part in zip(pieces[1::2], encoded["input_ids"][1:], strict=True):
            ids += [self.special[piece], *part]
        return tuple(ids)


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError after this much processor time, which does not depend on machine load."""
    if threading.current_thread() is not threading.main_thread():  # only it receives signals
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
    if path.is_file():  # preferred, as it supports images
        value = read_json(path)
        if not isinstance(value, dict) or not isinstance(value.get("chat_template"), str):
            raise DataError(f"{path}: expected an object with the text chat_template")
        return value["chat_template"]
    with contextlib.suppress(ValueError):  # there is none, or several without a default
        if template := tokenizer.get_chat_template():
            return template
    raise DataError(
        f"{directory}: no chat template (chat_template.jinja, chat_template.json or in "
        "tokenizer_config.json); take the directory of an instruction-tuned model"
    )
