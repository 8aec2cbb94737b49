"""Source rows to stored records, and stored records to examples.

In: a row of a source (reinforcement learning columns `problem`/`question`, `answer`/`solution`,
`images`/`image`; sharegpt `messages`/`conversations`; alpaca `instruction`, `input`, `output`).
Out: a `Record` (text, answer, images as their original bytes) that shards.py writes, and an
`Example` from what it wrote. Every error is a `DataError` that names the sample.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

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
    metadata = {k: v for k, v in row.items() if k not in used and v is not None and _is_json(v)}
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
        messages = tuple(Message(str(m["role"]), str(m["content"])) for m in value["messages"])
        answer, num_images = value.get("answer"), int(value["num_images"])
        metadata = dict(value.get("metadata") or {})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"{where}: not a stored sample ({type(error).__name__}: {error}); make the shards "
            "with tools/make_shards.py"
        ) from None
    messages = place_marks(_checked(messages, where), num_images, where)
    answer = None if answer is None else str(answer)
    return Example(index, key, shard, messages, answer, num_images, metadata)


def _conversation(
    row: Mapping[str, Any], where: str
) -> tuple[tuple[Message, ...], str | None, set[str]]:
    """Messages, answer and the columns that they were read from."""
    turns = next((c for c in ("messages", "conversations") if row.get(c) is not None), None)
    if turns:
        messages = tuple(_turn(turn, where) for turn in row[turns])
        return _checked(messages, where), _answer(row), {turns, *_ANSWER_COLUMNS}
    text = next((c for c in _TEXT_COLUMNS if row.get(c) is not None), None)
    if text:
        answer = _answer(row)
        if answer is None:
            raise DataError(
                f"{where}: no gold answer; expected a column {' or '.join(_ANSWER_COLUMNS)}, got "
                f"{sorted(row)}"
            )
        return (Message("user", str(row[text])),), answer, {text, *_ANSWER_COLUMNS}
    if row.get("instruction") is not None and row.get("output") is not None:
        parts = [str(row[c]) for c in ("instruction", "input") if row.get(c)]
        messages = (Message("user", "\n\n".join(parts)), Message("assistant", str(row["output"])))
        return messages, None, {"instruction", "input", "output"}
    raise DataError(
        f"{where}: columns {sorted(row)}; expected problem or question (with answer or solution), "
        "messages or conversations, or instruction and output"
    )


def _turn(turn: Any, where: str) -> Message:
    if isinstance(turn, Mapping):
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if isinstance(role, str) and isinstance(content, str):
            return Message(_SHAREGPT_ROLES.get(role, role), content)
    raise DataError(f"{where}: turn {str(turn)[:80]!r}; expected {{role, content}} as strings")


def _checked(messages: tuple[Message, ...], where: str) -> tuple[Message, ...]:
    unknown = [m.role for m in messages if m.role not in ROLES]
    if unknown or not any(m.role == "user" for m in messages):
        raise DataError(
            f"{where}: roles {[m.role for m in messages]}; expected {', '.join(ROLES)} with at "
            "least one user turn"
        )
    return messages


def _answer(row: Mapping[str, Any]) -> str | None:
    value = next((row[c] for c in _ANSWER_COLUMNS if row.get(c) is not None), None)
    if value is None:
        return None
    tagged = _ANSWER_TAG.fullmatch(str(value))
    return (tagged.group(1) if tagged else str(value)).strip()


def _image_files(value: Any, folder: Path, where: str) -> tuple[bytes, ...]:
    """Bytes of a column that holds an image or a list of them."""
    values = value if isinstance(value, list | tuple) else [value]
    return tuple(_image_file(v, folder, f"{where}, image {i}") for i, v in enumerate(values))


def _image_file(value: Any, folder: Path, where: str) -> bytes:
    if isinstance(value, bytes | bytearray):
        return bytes(value)
    if isinstance(value, Image.Image):
        buffer = io.BytesIO()
        value.save(buffer, format="PNG")
        return buffer.getvalue()
    if isinstance(value, Mapping):
        if value.get("bytes") is not None:
            return _image_file(value["bytes"], folder, where)
        value = value.get("path")
    if isinstance(value, str | Path):
        try:
            return (folder / value).read_bytes()
        except OSError as error:
            raise DataError(f"{where}: {folder / value}: {error.strerror}") from None
    raise DataError(
        f"{where}: a {type(value).__name__}; expected bytes, a path, a PIL image or "
        "{'bytes': …, 'path': …}"
    )


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True
