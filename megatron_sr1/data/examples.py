"""Source rows to stored records, and stored records to examples.

In: a row of a source (reinforcement learning columns `problem`/`question`, `answer`/`solution`,
`images`/`image`; sharegpt `messages`/`conversations`; alpaca `instruction`, `input`, `output`).
Out: a `Record` (text, answer, images as their original bytes) that shards.py writes, and an
`Example` from what it wrote. Every error is a `DataError` that names the sample.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

from PIL import Image

from megatron_sr1.data.guards import (
    MAX_IMAGE_BYTES,
    MAX_IMAGES,
    check_text,
    inside,
    is_json,
    read_file,
    shown,
)
from megatron_sr1.data.images import decode_image
from megatron_sr1.errors import DataError
from megatron_sr1.records import Example, Message

IMAGE_MARK = "<image>"
ROLES = ("system", "user", "assistant")
_TEXT_COLUMNS = ("problem", "question")
_ANSWER_COLUMNS = ("answer", "solution")
_IMAGE_COLUMNS = ("images", "image")
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
_ANSWER_TAG = re.compile(r"\s*<answer>(.*)</answer>\s*", re.DOTALL)


@dataclass(frozen=True)
class Record:
    """A sample as it is stored.

    Attributes:
        messages: the conversation; `<image>` marks stand for `images`, in order.
        answer: gold answer or None.
        images: the image files' original bytes.
        metadata: further columns, JSON values.
    """

    messages: tuple[Message, ...]
    answer: str | None = None
    images: tuple[bytes, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)


def record_from_row(row: Mapping[str, Any], *, folder: Path, where: str) -> Record:
    """Turn one row of a source into a record.

    Args:
        row: columns of the row; see the module's docstring.
        folder: relative image paths start here.
        where: names the row in errors, as `train.parquet row 17`.

    Returns:
        the record, its images decoded once to see that they can be, its marks counted.

    Raises:
        DataError: unknown columns, missing text or answer, bad image, marks that do not fit.
    """
    messages, answer, used = _conversation(row, where)
    column = next((c for c in _IMAGE_COLUMNS if row.get(c) is not None), None)
    images = _image_files(row[column], folder, where) if column else ()
    for number, data in enumerate(images):
        decode_image(data, f"{where}, image {number}")
    used = {*used, *_IMAGE_COLUMNS}
    metadata = {k: v for k, v in row.items() if k not in used and v is not None and is_json({k: v})}
    return Record(place_marks(messages, len(images), where), answer, images, metadata)


def place_marks(messages: Sequence[Message], num_images: int, where: str) -> tuple[Message, ...]:
    """Check the `<image>` marks of a conversation against its images.

    Without any mark, marks are put in front of the first user turn, one an image.

    Raises:
        DataError: another number of marks than images, or no user turn to put them into.
    """
    marks = sum(m.content.count(IMAGE_MARK) for m in messages)
    if marks == num_images:
        return tuple(messages)
    user = next((i for i, m in enumerate(messages) if m.role == "user"), None)
    if marks or user is None:
        raise DataError(
            f"{where}: {marks} {IMAGE_MARK} marks in the text but {num_images} images; expected "
            "one mark an image, or none at all"
        )
    placed = Message("user", IMAGE_MARK * num_images + messages[user].content)
    return (*messages[:user], placed, *messages[user + 1 :])


def stored(record: Record) -> dict[str, Any]:
    """The JSON object of a record, without its images' bytes."""
    return {
        "messages": [{"role": m.role, "content": m.content} for m in record.messages],
        "answer": record.answer,
        "num_images": len(record.images),
        "metadata": dict(record.metadata),
    }


def example_from_stored(value: Any, *, index: int, key: str, shard: str) -> Example:
    """Turn a stored JSON object into an example.

    Raises:
        DataError: fields missing or of the wrong type; names shard and sample.
    """
    where = f"{shard} sample {key}"
    try:
        turns, num_images = value["messages"], value["num_images"]
        answer, metadata = value.get("answer"), dict(value.get("metadata") or {})
        if not isinstance(turns, list) or type(num_images) is not int:
            raise TypeError("messages is no list, or num_images no whole number")
        messages = _checked(tuple(_turn(turn, where) for turn in turns), where)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = shown(f"{type(error).__name__}: {error}")
        raise DataError(
            f"{where}: not a stored sample ({reason}); make the shards with tools/make_shards.py"
        ) from None
    if not 0 <= num_images <= MAX_IMAGES:
        raise DataError(f"{where}: {num_images} images, at most {MAX_IMAGES}")
    messages = place_marks(messages, num_images, where)
    answer = None if answer is None else _gold(answer, where)
    metadata = {k: v for k, v in metadata.items() if is_json({k: v})}
    return Example(index, key, shard, messages, answer, num_images, metadata)


def _conversation(
    row: Mapping[str, Any], where: str
) -> tuple[tuple[Message, ...], str | None, set[str]]:
    """Messages, answer and the columns that they were read from."""
    turns = next((c for c in ("messages", "conversations") if row.get(c) is not None), None)
    if turns:
        if not isinstance(row[turns], list | tuple):
            raise DataError(f"{where}: {turns} is {shown(row[turns])}; expected a list of turns")
        messages = tuple(_turn(turn, where) for turn in row[turns])
        return _checked(messages, where), _answer(row, where), {turns, *_ANSWER_COLUMNS}
    text = next((c for c in _TEXT_COLUMNS if row.get(c) is not None), None)
    if text:
        answer = _answer(row, where)
        if answer is None:
            raise DataError(
                f"{where}: no gold answer; expected a column {' or '.join(_ANSWER_COLUMNS)}, got "
                f"{_columns(row)}"
            )
        messages = (Message("user", _string(row, text, where)),)
        return _checked(messages, where), answer, {text, *_ANSWER_COLUMNS}
    if row.get("instruction") is not None and row.get("output") is not None:
        parts = [_string(row, c, where) for c in ("instruction", "input") if row.get(c)]
        messages = (
            Message("user", "\n\n".join(parts)),
            Message("assistant", _string(row, "output", where)),
        )
        return _checked(messages, where), None, {"instruction", "input", "output"}
    raise DataError(
        f"{where}: columns {_columns(row)}; expected problem or question (with answer or "
        "solution), messages or conversations, or instruction and output"
    )


def _columns(row: Mapping[str, Any]) -> str:
    return shown(sorted(map(str, row)), 200)


def _string(row: Mapping[str, Any], column: str, where: str) -> str:
    value = row[column]
    if not isinstance(value, str):
        raise DataError(f"{where}: {column} is {shown(value)}; expected a string")
    return value


def _turn(turn: Any, where: str) -> Message:
    if isinstance(turn, Mapping):
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if isinstance(role, str) and isinstance(content, str):
            return Message(_SHAREGPT_ROLES.get(role, role), content)
        turn = f"role {shown(role)}, content {shown(content)}"
    raise DataError(f"{where}: turn {shown(turn)}; expected {{role, content}} as strings")


def _checked(messages: tuple[Message, ...], where: str) -> tuple[Message, ...]:
    """Turns of known roles, with text that can be tokenised."""
    roles = [m.role for m in messages]
    if any(role not in ROLES for role in roles) or "user" not in roles:
        raise DataError(
            f"{where}: roles {shown(roles)}; expected {', '.join(ROLES)} with at least one user "
            "turn"
        )
    check_text("".join(m.content for m in messages), where)
    return messages


def _answer(row: Mapping[str, Any], where: str) -> str | None:
    value = next((row[c] for c in _ANSWER_COLUMNS if row.get(c) is not None), None)
    if value is None:
        return None
    gold = _gold(value, where)
    tagged = _ANSWER_TAG.fullmatch(gold)
    return (tagged.group(1) if tagged else gold).strip()


def _gold(value: Any, where: str) -> str:
    """A gold answer as text; a number is as good."""
    number = isinstance(value, int | float | Decimal) and not isinstance(value, bool)
    if isinstance(value, str) or (number and math.isfinite(value)):
        return check_text(str(value), f"{where}, answer")
    raise DataError(f"{where}: the answer is {shown(value)}; expected a string or a number")


def _image_files(value: Any, folder: Path, where: str) -> tuple[bytes, ...]:
    """Bytes of a column that holds an image or a list of them."""
    values = value if isinstance(value, list | tuple) else [value]
    if len(values) > MAX_IMAGES:
        raise DataError(f"{where}: {len(values)} images, at most {MAX_IMAGES}")
    return tuple(_image_file(v, folder, f"{where}, image {i}") for i, v in enumerate(values))


def _image_file(value: Any, folder: Path, where: str) -> bytes:
    if isinstance(value, Mapping):
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if isinstance(value, bytes | bytearray):
        return bytes(value)
    if isinstance(value, Image.Image):
        buffer = io.BytesIO()
        value.save(buffer, format="PNG")
        return buffer.getvalue()
    if isinstance(value, str | Path):
        return read_file(inside(folder, value, where), MAX_IMAGE_BYTES, where)
    raise DataError(
        f"{where}: a {type(value).__name__}; expected bytes, a path, a PIL image or "
        "{'bytes': …, 'path': …}"
    )
