r"""The `<image>` marks of a conversation: where its images are.

In a user's or a system turn `<image>` marks an image, and `\<image>` is the text `<image>`. An even
number of backslashes escapes nothing, so that LaTeX's line break `\\` may precede an image. What an
assistant says is text as it is: an assistant shows no images.
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
    """Texts around the image marks of a turn, escapes resolved; one more than it has marks."""
    if turn.role == "assistant":
        return [turn.content]
    pieces = [*_MARK.split(turn.content), ""]
    texts = (text + slashes for text, slashes in zip(pieces[::2], pieces[1::2], strict=True))
    return [text.replace(ESCAPED_MARK, IMAGE_MARK) for text in texts]


def count_marks(messages: Sequence[Message]) -> int:
    """Image marks of a conversation."""
    return sum(len(split_at_marks(m)) - 1 for m in messages)


def escape_marks(text: str) -> str:
    """A text in which nothing marks an image, for a user's or a system turn."""
    return _MARK.sub(r"\1\\<image>", text)


def place_marks(messages: Sequence[Message], num_images: int, where: str) -> tuple[Message, ...]:
    """Check the `<image>` marks of a conversation against its images.

    Without any mark, marks are put in front of the first user turn, one an image.

    Raises:
        DataError: another number of marks than images, or no user turn to put them into.
    """
    marks = count_marks(messages)
    if marks == num_images:
        return tuple(messages)
    user = next((i for i, m in enumerate(messages) if m.role == "user"), None)
    if marks or user is None:
        raise DataError(
            f"{where}: {marks} {IMAGE_MARK} marks in the text but {num_images} images; expected "
            f"one mark an image, or none at all; write {ESCAPED_MARK} where a user's text means "
            "these characters (in an assistant turn they are never a mark)",
            kind="image marks and images differ in number",
        )
    placed = Message("user", IMAGE_MARK * num_images + messages[user].content)
    return (*messages[:user], placed, *messages[user + 1 :])
