"""Converts the turns of a source's conversation to messages, and extracts inline images.

In: turns as `{"role", "content"}` or sharegpt's `{"from", "value"}`. A content is a string, or a
list of parts as in OpenAI's API: `{"type": "text", "text"}`, `{"type": "image"}` for the next image
of the image column, and parts that contain an image (`image`, `image_url`, `url`, `path`). Out:
messages with `<image>` marks; `<image>` in the text of a part is not a mark.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_sr1.data.guards import shown
from megatron_sr1.data.marks import IMAGE_MARK, escape_marks
from megatron_sr1.errors import DataError
from megatron_sr1.records import Message

_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
_TEXT_PARTS = ("text", "input_text", "output_text")
_IMAGE_PARTS = ("image", "image_url", "input_image")
_IMAGE_FIELDS = ("image", "image_url", "url", "path")


def read_turns(turns: Any, column: str, where: str) -> tuple[tuple[Message, ...], list[Any]]:
    """Return the messages of a conversation, and its inline images in order.

    Args:
        turns: a list of turns.
        column: names their column in errors.
        where: names the row in errors.

    Raises:
        DataError: invalid turns, a part of an unknown kind, or an image in an assistant turn.
    """
    if not isinstance(turns, list | tuple):
        raise DataError(f"{where}: {column} is {shown(turns)}; expected a list of turns")
    images: list[Any] = []
    return tuple(_turn(turn, images, where) for turn in turns), images


def _turn(turn: Any, images: list[Any], where: str) -> Message:
    if isinstance(turn, Mapping):
        role, content = (
            turn.get(new) if turn.get(new) is not None else turn.get(old)
            for new, old in (("role", "from"), ("content", "value"))
        )
        if isinstance(role, str) and isinstance(content, str):
            return Message(_SHAREGPT_ROLES.get(role, role), content)
        if isinstance(role, str) and isinstance(content, list | tuple) and content:
            role = _SHAREGPT_ROLES.get(role, role)
            return Message(role, "".join(_part(p, role, images, where) for p in content))
        turn = f"role {shown(role)}, content {shown(content)}"
    raise DataError(
        f"{where}: turn {shown(turn)}; expected {{role, content}} as strings, or content as parts",
        kind="a turn that is not {role, content}",
    )


def _part(part: Any, role: str, images: list[Any], where: str) -> str:
    """Return the text of a part; an image inside it is appended to `images`."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind in _TEXT_PARTS and isinstance(part.get("text"), str):
        return part["text"] if role == "assistant" else escape_marks(part["text"])
    if kind not in _IMAGE_PARTS:
        what = f"of type {shown(kind)}" if isinstance(part, Mapping) else shown(part)
        raise DataError(
            f"{where}: a part {what} in the content; expected "
            '{"type": "text", "text": …} or {"type": "image"}',
            kind="a part of a content that is neither text nor image",
        )
    if role == "assistant":
        raise DataError(
            f"{where}: an image part in an assistant turn; a model that writes text shows no images"
        )
    found = next((part[f] for f in _IMAGE_FIELDS if part.get(f) is not None), None)
    if isinstance(found, Mapping) and "url" in found:
        found = found["url"]
    if found is not None:
        images.append(found)
    return IMAGE_MARK
