"""Prompts: the instructions of each recipe, and the text-only second pass.

In: an `Example`, or a question and a description. Out: chat messages for transformers' chat
templates, each content a list of `{"type": "image"}` and `{"type": "text"}` parts. Source of the
form (three spans, a self-contained description, a reader without the image): arXiv 2508.19652,
section 3. The wording is this project's own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_sr1.data.marks import ESCAPED_MARK, IMAGE_MARK, escape_marks, split_at_marks
from megatron_sr1.errors import ConfigError, DataError
from megatron_sr1.records import Example, Message

ChatMessage = dict[str, Any]
"""{"role": str, "content": [{"type": "text", "text": str} | {"type": "image"}, …]}"""

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
PASS1_INSTRUCTIONS: Mapping[str, Mapping[str, str]] = {
    "full": {"vision_sr1": _DESCRIBE, "see_think": _DESCRIBE, "vision_r1": _THINK},
    "brief": {
        "vision_sr1": "Describe, think, answer.",
        "see_think": "Describe, think, answer.",
        "vision_r1": "Think, answer.",
    },
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
    """Return the chat messages of pass 1: the question with its images, then the instruction.

    Args:
        example: its turns up to and including the last user turn are used.
        recipe: `reward.recipe`: vision_sr1 | see_think | vision_r1.
        style: full | brief.

    Raises:
        ConfigError: unknown recipe or style.
        DataError: there are image marks after the last user turn.
    """
    instruction = _choice(_choice(PASS1_INSTRUCTIONS, style, "style"), recipe, "recipe")
    gap = "\n" if style == "brief" else "\n\n"
    last = max(i for i, m in enumerate(example.messages) if m.role == "user")
    turns = list(example.messages[: last + 1])
    turns[last] = Message("user", f"{turns[last].content.rstrip()}{gap}{instruction}")
    messages = chat_messages(turns)
    found = sum(part["type"] == "image" for m in messages for part in m["content"])
    if found != example.num_images:
        raise DataError(
            f"{example.shard} sample {example.key}: {found} {IMAGE_MARK} marks up to the last user "
            f"turn, {example.num_images} images; images of later turns cannot be asked about"
        )
    return messages


def pass2_messages(
    question: str, description: str, style: str = "full", order: str = "question_first"
) -> list[ChatMessage]:
    """Return the chat messages of pass 2: one user turn with one text part.

    Args:
        question: the question of pass 1 with its options; its image marks are removed.
        description: the text inside the description span; `<image>` in it stays text.
        style: full | brief.
        order: question_first (the part that a prompt's descriptions share comes first, so that the
            engine's prefix cache serves it) | description_first (as in arXiv 2508.19652).
    """
    templates = _choice(PASS2_TEMPLATES, style, "style")
    before, between, after = _choice(templates, order, "order of pass 2")
    parts = [strip_image_marks(question), description.strip()]
    first, second = parts if order == "question_first" else reversed(parts)
    text = f"{before}{first}{between}{second}{after}"
    return [{"role": "user", "content": [{"type": "text", "text": text}]}]


def chat_messages(turns: Sequence[Message]) -> list[ChatMessage]:
    """Convert turns with `<image>` marks to chat messages with image parts."""
    return [{"role": turn.role, "content": _parts(turn)} for turn in turns]


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
    is_assistant = message["role"] == "assistant"
    return "".join(
        IMAGE_MARK
        if part["type"] == "image"
        else (part["text"] if is_assistant else escape_marks(part["text"]))
        for part in message["content"]
    )


def _parts(turn: Message) -> list[dict[str, str]]:
    parts: list[dict[str, str]] = []
    for number, text in enumerate(split_at_marks(turn)):
        if number:
            parts.append({"type": "image"})
        if text:
            parts.append({"type": "text", "text": text})
    return parts


def _choice(table: Mapping[str, Any], name: str, what: str) -> Any:
    if name not in table:
        raise ConfigError(f"prompt {what} is {name!r}; expected {' | '.join(table)}")
    return table[name]
