"""Converts source rows to records, from the column layouts of common data sets.

In: a row of a source. For reinforcement learning: `problem`/`question`/`prompt`,
`answer`/`solution` and `images`/`image`, or verl's `prompt` of messages with `reward_model`. For
supervised fine-tuning: sharegpt's `messages`/`conversations`, or alpaca's `instruction`, `input`,
`output`; `system` and `history` with either. Out: a `Record`. An empty column counts as absent; a
column whose content would be lost is rejected. Every error is a `DataError` that names the row.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_sr1.data.examples import (
    IMAGE_MARK,
    Record,
    checked_turns,
    escape_marks,
    gold_answers,
    place_marks,
)
from megatron_sr1.data.guards import MAX_IMAGE_BYTES, MAX_IMAGES, inside, is_json, read_file, shown
from megatron_sr1.data.images import decode_image
from megatron_sr1.errors import DataError
from megatron_sr1.records import Message

_TURN_COLUMNS = ("messages", "conversations")
_TEXT_COLUMNS = ("problem", "question", "prompt")
_ALPACA_COLUMNS = ("instruction", "input", "output")
_ANSWER_COLUMNS = ("reward_model.ground_truth", "answer", "solution")
_IMAGE_COLUMNS = ("images", "image")
_BEFORE_COLUMNS = ("system", "history")
_REFUSED_COLUMNS = ("tools", "videos", "video", "audios", "audio")
_ALTERNATIVES = (
    (*_TURN_COLUMNS, *_TEXT_COLUMNS),
    ("reward_model", *_ANSWER_COLUMNS),
    _IMAGE_COLUMNS,
)
"""Groups of alternative columns: a mapped column replaces the others of its group."""
COLUMNS = frozenset(
    (*_TURN_COLUMNS, *_TEXT_COLUMNS, *_ALPACA_COLUMNS, *_BEFORE_COLUMNS, "answer", "solution")
    + _IMAGE_COLUMNS
)
"""Names with a meaning; all other columns are metadata."""
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
_TEXT_PARTS = ("text", "input_text", "output_text")
_IMAGE_PARTS = ("image", "image_url", "input_image")
_IMAGE_FIELDS = ("image", "image_url", "url", "path")
_DATA_URI = re.compile(r"data:image/[\w.+-]+;base64,")


def record_from_row(
    row: Mapping[str, Any], *, folder: Path, where: str, columns: Mapping[str, str]
) -> Record:
    """Convert one row of a source to a record.

    Args:
        row: columns of the row; see the module's docstring.
        folder: base of relative image paths, which must not lead out of it.
        where: names the row in errors, e.g. `train.parquet row 17`.
        columns: name -> location of its value in the row: a column, or a dotted path into one
            (`prompt.0.content`). Alternatives of a mapped column become metadata.

    Returns:
        the record, after a trial decoding of its images and a check of its marks.
    """
    known = _renamed(row, columns, where)
    lost = next((c for c in _REFUSED_COLUMNS if _is_given(known.get(c))), None)
    if lost:
        raise DataError(
            f"{where}: the column {lost} is not empty, but training does not support it; "
            "remove the row or the column"
        )
    messages, inline, used = _conversation(known, where)
    answers, answer_column = _answers(known, where)
    is_sft = used.isdisjoint(_TEXT_COLUMNS) and any(m.role == "assistant" for m in messages)
    if not answers and not is_sft:
        raise DataError(
            f"{where}: no gold answer; expected a column answer or solution that is not empty (or "
            f"reward_model.ground_truth), got {_columns(row)}"
        )
    images = _image_files(_images(known, inline, where), folder, where)
    for number, data in enumerate(images):
        decode_image(data, f"{where}, image {number}")
    messages = place_marks(messages, len(images), where)
    for number, message in enumerate(messages):
        if message.role != "system" and not message.content.strip():
            raise DataError(f"{where}: turn {number} ({message.role}) is empty; expected text")
    used = {*used, answer_column, *_IMAGE_COLUMNS, *_BEFORE_COLUMNS} - columns.keys()
    metadata = _metadata(row, used | {*columns.values()})
    return Record(messages, answers[0] if answers else None, images, metadata, answers[1:])


def _renamed(row: Mapping[str, Any], columns: Mapping[str, str], where: str) -> Mapping[str, Any]:
    """Move mapped columns to their names and remove their alternatives."""
    found = {name: _look_up(row, path) for name, path in columns.items()}
    for name, value in found.items():
        if value is None and name not in _IMAGE_COLUMNS:
            raise DataError(
                f"{where}: nothing at {columns[name]}, which is mapped to the column {name}; the "
                f"row has {_columns(row)}"
            )
    replaced = {c for group in _ALTERNATIVES if not found.keys().isdisjoint(group) for c in group}
    return {**{k: v for k, v in row.items() if k not in replaced}, **found}


def _look_up(row: Mapping[str, Any], path: str) -> Any:
    """Return the value of a column or at a dotted path, or None if there is nothing."""
    if path in row:
        return row[path]
    value: Any = row
    for step in path.split("."):
        if isinstance(value, Mapping):
            value = value.get(step)
        elif isinstance(value, list | tuple) and step.isdecimal() and int(step) < len(value):
            value = value[int(step)]
        else:
            return None
    return value


def _is_given(value: Any) -> bool:
    """Return True if a column is not empty: not None, blank, an empty list or an empty object."""
    if isinstance(value, str):
        return bool(value.strip())
    return value is not None and not (isinstance(value, list | tuple | Mapping) and not value)


def _conversation(
    row: Mapping[str, Any], where: str
) -> tuple[tuple[Message, ...], list[Any], set[str]]:
    """Return the messages, the images inside them, and the columns they were read from."""
    lists = (*_TURN_COLUMNS, *(("prompt",) if not isinstance(row.get("prompt"), str) else ()))
    column = next((c for c in lists if _is_given(row.get(c))), None)
    if column is None:
        turns, used = _single_turn(row, where)
        turns = [*_history(row, where), *turns]
    elif _is_given(row.get("history")):
        raise DataError(f"{where}: both {column} and history; put all turns into {column}")
    else:
        turns, used = row[column], {column}
    if not isinstance(turns, list | tuple):
        raise DataError(f"{where}: {column} is {shown(turns)}; expected a list of turns")
    images: list[Any] = []
    messages = [_message(turn, images, where) for turn in turns]
    return checked_turns((*_system(row, messages, where), *messages), where), images, used


def _single_turn(row: Mapping[str, Any], where: str) -> tuple[list[dict[str, str]], set[str]]:
    """Return the turns of a row with separate text columns, and these columns."""
    text = next((c for c in _TEXT_COLUMNS if _is_given(row.get(c))), None)
    if text:
        return [{"role": "user", "content": _string(row, text, where)}], {text}
    asked = [_string(row, c, where) for c in ("instruction", "input") if _is_given(row.get(c))]
    if asked and _is_given(row.get("output")):
        said = {"role": "assistant", "content": _string(row, "output", where)}
        return [{"role": "user", "content": "\n\n".join(asked)}, said], {*_ALPACA_COLUMNS}
    raise DataError(
        f"{where}: columns {_columns(row)}; expected problem or question (with answer or "
        "solution), messages or conversations, or instruction and output, and not empty"
    )


def _history(row: Mapping[str, Any], where: str) -> list[dict[str, str]]:
    """Return alpaca's earlier turns, a list of (question, answer) pairs."""
    pairs = row.get("history")
    if not _is_given(pairs):
        return []
    if not isinstance(pairs, list | tuple) or not all(
        isinstance(p, list | tuple) and len(p) == 2 and all(isinstance(t, str) for t in p)
        for p in pairs
    ):
        raise DataError(f"{where}: history is {shown(pairs)}; expected [[question, answer], …]")
    roles = ("user", "assistant")
    return [{"role": r, "content": t} for p in pairs for r, t in zip(roles, p, strict=True)]


def _system(row: Mapping[str, Any], messages: Sequence[Message], where: str) -> list[Message]:
    """Return the system turn of the column `system`, unless the conversation has the same one."""
    if not _is_given(row.get("system")):
        return []
    turn = Message("system", _string(row, "system", where))
    if not messages or messages[0].role != "system":
        return [turn]
    if messages[0].content.strip() != turn.content.strip():
        raise DataError(
            f"{where}: the column system and the system turn of the conversation differ; keep one"
        )
    return []


def _message(turn: Any, images: list[Any], where: str) -> Message:
    """Convert a turn, `{"role", "content"}` or sharegpt's `{"from", "value"}`.

    The content is a string, or a list of parts as in OpenAI's API, in whose texts `<image>` is not
    a mark.
    """
    if isinstance(turn, Mapping):
        role, content = (
            turn.get(new) if turn.get(new) is not None else turn.get(old)
            for new, old in (("role", "from"), ("content", "value"))
        )
        role = _SHAREGPT_ROLES.get(role, role) if isinstance(role, str) else role
        if isinstance(role, str) and isinstance(content, str):
            return Message(role, content)
        if isinstance(role, str) and isinstance(content, list | tuple) and content:
            return Message(role, "".join(_part(p, role, images, where) for p in content))
        turn = f"role {shown(role)}, content {shown(content)}"
    raise DataError(
        f"{where}: turn {shown(turn)}; expected {{role, content}} as strings, or content as parts"
    )


def _part(part: Any, role: str, images: list[Any], where: str) -> str:
    """Return the text of a part, or a mark; an image inside the part is appended to `images`."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind in _TEXT_PARTS and isinstance(part.get("text"), str):
        return part["text"] if role == "assistant" else escape_marks(part["text"])
    if kind not in _IMAGE_PARTS:
        what = f"of type {shown(kind)}" if isinstance(part, Mapping) else shown(part)
        raise DataError(
            f"{where}: a part {what} in the content; expected "
            '{"type": "text", "text": …} or {"type": "image"}'
        )
    if role == "assistant":
        raise DataError(
            f"{where}: an image part in an assistant turn; a model that writes text shows no images"
        )
    found = next((part[f] for f in _IMAGE_FIELDS if part.get(f) is not None), None)
    if isinstance(found, Mapping) and "url" in found:
        found = found["url"]
    if found is not None:  # otherwise the next image of the image column
        images.append(found)
    return IMAGE_MARK


def _answers(row: Mapping[str, Any], where: str) -> tuple[tuple[str, ...], str]:
    """Return the gold answers of the first column that has any, and the column."""
    for column in _ANSWER_COLUMNS:
        answers = gold_answers(_look_up(row, column), where)
        if answers:
            return answers, column
    return (), ""


def _images(row: Mapping[str, Any], inline: list[Any], where: str) -> Any:
    """Return the value of the column with the images, or those inside the turns."""
    values = {c: row[c] for c in _IMAGE_COLUMNS if row.get(c) is not None}
    given = [c for c, v in values.items() if not (isinstance(v, list | tuple) and not v)]
    if len(given) == 2 and values["images"] in (values["image"], [values["image"]]):
        given.pop()
    if len(given) + bool(inline) > 1:
        what = " and in ".join([*given, *(["the turns themselves"] if inline else [])])
        raise DataError(f"{where}: images in {what}; keep only one of them")
    return values[given[0]] if given else inline


def _image_files(value: Any, folder: Path, where: str) -> tuple[bytes, ...]:
    """Return the bytes of an image or of a list of images."""
    values = value if isinstance(value, list | tuple) else [value]
    if len(values) > MAX_IMAGES:
        raise DataError(f"{where}: {len(values)} images, at most {MAX_IMAGES}")
    return tuple(_image_file(v, folder, f"{where}, image {i}") for i, v in enumerate(values))


def _image_file(value: Any, folder: Path, where: str) -> bytes:
    """Return the bytes of an image: a path, bytes, a data: URI, or `{"bytes", "path"}`."""
    if isinstance(value, Mapping):
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise DataError(
            f"{where}: a {type(value).__name__}; expected bytes, a path, or "
            "{'bytes': …, 'path': …}"
        )
    if not value.startswith("data:"):
        return read_file(inside(folder, value, where), MAX_IMAGE_BYTES, where)
    head = _DATA_URI.match(value)
    try:
        if head is not None:
            return base64.b64decode("".join(value[head.end() :].split()), validate=True)
    except ValueError:  # incomplete, or characters outside the alphabet
        pass
    raise DataError(f"{where}: {shown(value)}; expected data:image/…;base64, followed by base64")


def _metadata(row: Mapping[str, Any], used: set[str]) -> dict[str, Any]:
    left = {k: v for k, v in row.items() if k not in used and v is not None}
    known = COLUMNS | {*_REFUSED_COLUMNS}
    return {k: v for k, v in left.items() if (k not in known or _is_given(v)) and is_json(k, v)}


def _columns(row: Mapping[str, Any]) -> str:
    return shown(sorted(map(str, row)), 200)


def _string(row: Mapping[str, Any], column: str, where: str) -> str:
    value = row[column]
    if not isinstance(value, str):
        raise DataError(f"{where}: {column} is {shown(value)}; expected a string")
    return value
