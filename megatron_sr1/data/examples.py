r"""A sample as the data set gives it: turns, image marks, gold answers, and its stored form.

`<image>` in a user or system turn marks an image; `\<image>` is the text `<image>`. An even number
of backslashes escapes nothing, so LaTeX's line break `\\` may precede an image. Assistant turns are
plain text, as an assistant shows no images. Every error is a `DataError`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from megatron_sr1.data.guards import MAX_IMAGES, check_text, is_json, located, shown
from megatron_sr1.data.images import ImageInfo
from megatron_sr1.errors import DataError
from megatron_sr1.records import Example, Message

IMAGE_MARK = "<image>"
ESCAPED_MARK = "\\<image>"
MAX_GOLDS = 64
"""Limit per sample; each is compared with each response."""
_MARK = re.compile(r"(?<!\\)((?:\\\\)*)<image>")
_ROLES = ("system", "user", "assistant")
_TAG = re.compile(r"<(/?)answer>", re.IGNORECASE)
_SAID = re.compile(
    r"(?:^|[.!?] )(?:(?:so|thus|hence|therefore),? )?(?:the )?(?:final |correct )?"
    r"answer(?: is:?|:) (\S.*)$",
    re.IGNORECASE,
)
_NOTHING = re.compile(r"\\boxed|[\s${}]")
_TO_DO = "write the answer alone there, or name its column with --column answer=NAME"


@dataclass(frozen=True)
class Record:
    """A sample to store.

    Attributes:
        messages: the conversation; its `<image>` marks refer to `images`, in order.
        answer: gold answer or None.
        images: original bytes of the image files.
        metadata: further columns, JSON values.
        other_answers: further gold answers, each of which is right.
        info: of each image, if they were decoded; not stored.
    """

    messages: tuple[Message, ...]
    answer: str | None = None
    images: tuple[bytes, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)
    other_answers: tuple[str, ...] = ()
    info: tuple[ImageInfo, ...] = ()


def stored(record: Record) -> dict[str, Any]:
    """Return the JSON object of a record, without the images' bytes."""
    others = {"other_answers": list(record.other_answers)} if record.other_answers else {}
    return {
        "messages": [{"role": m.role, "content": m.content} for m in record.messages],
        "answer": record.answer,
        **others,
        "num_images": len(record.images),
        "metadata": dict(record.metadata),
    }


def example_from_stored(value: Any, *, index: int, key: str, shard: str) -> Example:
    """Convert a stored JSON object to an example."""
    try:
        turns, num_images = value["messages"], value["num_images"]
        answer, metadata = value.get("answer"), dict(value.get("metadata") or {})
        others = value.get("other_answers") or []
        if not isinstance(turns, list) or type(num_images) is not int:
            raise TypeError("messages is not a list, or num_images not an integer")
        if not isinstance(others, list) or len(others) >= MAX_GOLDS:
            raise TypeError(f"other_answers is not a list of fewer than {MAX_GOLDS}")
        messages = tuple(Message(turn["role"], turn["content"]) for turn in turns)
        if not all(type(m.role) is str and type(m.content) is str for m in messages):
            raise TypeError("a turn's role or content is not a string")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"not a stored sample ({shown(f'{type(error).__name__}: {error}')})"
        raise DataError(f"{reason}; make the shards with tools/make_shards.py") from None
    if not 0 <= num_images <= MAX_IMAGES:
        raise DataError(f"{num_images} images, at most {MAX_IMAGES}")
    messages = place_marks(checked_turns(messages), num_images)
    golds = [_gold_text(a) for a in (answer, *others) if a is not None]
    golds = [gold for gold in golds if gold.strip()]  # an empty one cannot be compared with
    metadata = {k: v for k, v in metadata.items() if is_json(k, v)}
    first = golds[0] if golds else None
    return Example(index, key, shard, messages, first, num_images, metadata, tuple(golds[1:]))


def checked_turns(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """Return the turns after checking their roles (at least one user turn) and text."""
    roles = [m.role for m in messages]
    if not {"user"} <= set(roles) <= set(_ROLES):
        expected = f"{', '.join(_ROLES)} with at least one user turn"
        raise DataError(f"roles {shown(roles)}; expected {expected}")
    check_text("".join(m.content for m in messages))
    return messages


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


def place_marks(messages: Sequence[Message], num_images: int) -> tuple[Message, ...]:
    """Check that a conversation has a mark per image.

    If it has no marks, one per image is inserted at the start of the first user turn.
    """
    marks = count_marks(messages)
    if marks == num_images:
        return tuple(messages)
    user = next((i for i, m in enumerate(messages) if m.role == "user"), None)
    if marks or user is None:
        raise DataError(
            f"{marks} {IMAGE_MARK} marks in the text but {num_images} images; expected one mark "
            f"per image, or none at all; write {ESCAPED_MARK} where a user's text means these "
            "characters (in an assistant turn they are never a mark)"
        )
    placed = Message("user", IMAGE_MARK * num_images + messages[user].content)
    return (*messages[:user], placed, *messages[user + 1 :])


def gold_answers(value: Any) -> tuple[str, ...]:
    r"""Return the distinct gold answers of a column: a text, a number, or a list of them.

    A text may be a whole solution, whose answer follows `</think>`, is enclosed by `<answer>`, or
    follows `####` or "The answer is" in the last line. A solution without any of these markers
    stays unchanged (the grader uses its last `\boxed{}`). An answer that no response can match is
    an error.
    """
    values = value if isinstance(value, list | tuple) else [value]
    if len(values) > MAX_GOLDS:
        raise DataError(f"{len(values)} gold answers, at most {MAX_GOLDS}")
    texts = (_gold_text(v).strip() for v in values if v is not None)
    return tuple(dict.fromkeys(_answer_alone(text) for text in texts if text))


def _gold_text(value: Any) -> str:
    """Return a gold answer as text; numbers are accepted."""
    number = isinstance(value, int | float | Decimal) and not isinstance(value, bool)
    if isinstance(value, str) or (number and math.isfinite(value)):
        with located("answer"):
            return check_text(str(value))
    expected = "expected a string or a number, or a list of them"
    raise DataError(f"the answer is {shown(value)}; {expected}")


def _answer_alone(text: str) -> str:
    """Return the answer part of a text; DataError if nothing is left or it is ambiguous."""
    rest = text.rpartition("</think>")[2]
    found = _in_last_line(_in_tags(rest.strip()))
    if "<think>" in found and "</think>" not in text:
        raise DataError(f"the gold answer opens <think> and does not close it; {_TO_DO}")
    if not _NOTHING.sub("", found):
        raise DataError(f"the gold answer {shown(text)} is empty; {_TO_DO}")
    return found


def _in_tags(text: str) -> str:
    pieces = _TAG.split(text)
    if len(pieces) == 1:
        return text
    answers = {answer.strip() for answer in pieces[2::4]}
    if pieces[1::2] != ["", "/"] * (len(pieces) // 4) or len(answers) != 1:
        tags = f"{len(pieces) // 2} <answer> and </answer> tags in the gold answer"
        raise DataError(f"{tags} that do not enclose one answer; {_TO_DO}")
    return answers.pop()


def _in_last_line(text: str) -> str:
    last = text.splitlines()[-1] if text else ""
    if "####" in last:
        return last.rpartition("####")[2].strip()
    said = _SAID.search(" ".join(last.split()))
    if said is not None:
        return said[1]
    if "####" in text and "\\boxed" not in text:
        raise DataError(f"#### in the gold answer, but not in its last line; {_TO_DO}")
    return text
