r"""The `<image>` marks of a conversation, which say where its images are.

In user and system turns, `<image>` marks an image and `\<image>` is the text `<image>`. An even
number of backslashes escapes nothing, so LaTeX's line break `\\` may precede an image. Assistant
turns are plain text, as an assistant shows no images.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from megatron_sr1.errors import DataError
from megatron_sr1.records import Message

IMAGE_MARK = "<image>"
ESCAPED_MARK = "\\<image>"
_MARK = re.compile(r"(?<!\\)((?:\\\\)*)<image>")


def split_at_marks(turn: Message) -> list[str]:
    """Split a turn at its image marks and resolve escapes; returns one text more than marks."""
    if turn.role == "assistant":
        return [turn.content]
    pieces = [*_MARK.split(turn.content), ""]
    texts = (text + slashes for text, slashes in zip(pieces[::2], pieces[1::2], strict=True))
    return [text.replace(ESCAPED_MARK, IMAGE_MARK) for text in texts]


def count_marks(messages: Sequence[Message]) -> int:
    """Return the number of image marks in a conversation."""
    return sum(len(split_at_marks(m)) - 1 for m in messages)


def escape_marks(text: str) -> str:
    """Escape all image marks of a text that is to be in a user or system turn."""
    return _MARK.sub(r"\1\\<image>", text)


def place_marks(messages: Sequence[Message], num_images: int, where: str) -> tuple[Message, ...]:
    """Check the `<image>` marks of a conversation against its images.

    If it has no marks, one per image is inserted at the start of the first user turn.

    Raises:
        DataError: marks and images differ in number, or no user turn to insert marks into.
    """
    marks = count_marks(messages)
    if marks == num_images:
        return tuple(messages)
    user = next((i for i, m in enumerate(messages) if m.role == "user"), None)
    if marks or user is None:
        raise DataError(
            f"{where}: {marks} {IMAGE_MARK} marks in the text but {num_images} images; expected "
            f"one mark per image, or none at all; write {ESCAPED_MARK} where a user's text means "
            "these characters (in an assistant turn they are never a mark)",
            kind="image marks and images differ in number",
        )
    placed = Message("user", IMAGE_MARK * num_images + messages[user].content)
    return (*messages[:user], placed, *messages[user + 1 :])
