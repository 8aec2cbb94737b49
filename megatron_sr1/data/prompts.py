"""Prompts: the messages of each pass, and the conversion of turns to chat messages.

The form (three spans, a self-contained description, a reader without the image) is that of arXiv
2508.19652, section 3; the wording is this project's own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_sr1.data.examples import ESCAPED_MARK, IMAGE_MARK, escape_marks, split_at_marks
from megatron_sr1.errors import DataError
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
