"""Converts a row of a data set to a record, from the column layouts of common data sets.

In: for reinforcement learning, `problem`/`question`/`prompt`, `answer`/`solution` and
`images`/`image`, or verl's `prompt` of messages with `reward_model`. For supervised fine-tuning,
sharegpt's `messages`/`conversations`, or alpaca's `instruction`, `input`, `output`; `system` and
`history` with either. Out: a `Record`, or a `DataError`. An empty column counts as absent; a column
whose content would be lost is rejected.
"""

from __future__ import annotations

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
from megatron_sr1.data.guards import MAX_IMAGES, is_json, located, shown
from megatron_sr1.data.images import ImageInfo, image_bytes, image_info
from megatron_sr1.errors import DataError
from megatron_sr1.records import Message

_TURN_COLUMNS = ("messages", "conversations")
_TEXT_COLUMNS = ("problem", "question", "prompt")
_ALPACA_COLUMNS = ("instruction", "input", "output")
ALPACA_GAPS = {"blank-line": "\n\n", "newline": "\n"}
"""Text between `instruction` and `input`. LLaMA-Factory, which made the published cold start, has
one newline."""
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
COLUMNS = frozenset({"answer", "solution"}).union(
    _TURN_COLUMNS, _TEXT_COLUMNS, _ALPACA_COLUMNS, _BEFORE_COLUMNS, _IMAGE_COLUMNS
)
"""Names with a meaning; all other columns are metadata."""
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
_TEXT_PARTS = ("text", "input_text", "output_text")
_IMAGE_PARTS = ("image", "image_url", "input_image")
_IMAGE_FIELDS = ("image", "image_url", "url", "path")


def record_from_row(
    row: Mapping[str, Any],
    folder: Path,
    columns: Mapping[str, str],
    alpaca_gap: str = ALPACA_GAPS["blank-line"],
) -> Record:
    """Convert one row of a source to a record, after a trial decoding of its images.

    Args:
        row: its columns.
        folder: base of relative image paths, which must not lead out of it.
        columns: name -> location of its value in the row: a column, or a dotted path into one
            (`prompt.0.content`). Alternatives of a mapped column become metadata.
        alpaca_gap: text between alpaca's `instruction` and `input`.
    """
    known = _renamed(row, columns)
    lost = next((c for c in _REFUSED_COLUMNS if _is_given(known.get(c))), None)
    if lost:
        raise DataError(
            f"the column {lost} is not empty, but training does not support it; remove the row "
            "or the column"
        )
    messages, inline, used = _conversation(known, alpaca_gap)
    found = ((gold_answers(_look_up(known, c)), c) for c in _ANSWER_COLUMNS)
    answers, answer_column = next((pair for pair in found if pair[0]), ((), ""))
    is_sft = used.isdisjoint(_TEXT_COLUMNS) and any(m.role == "assistant" for m in messages)
    if not answers and not is_sft:
        raise DataError(
            "no gold answer; expected a column answer or solution that is not empty (or "
            f"reward_model.ground_truth), got {_columns(row)}"
        )
    images, info = _image_files(known, inline, folder)
    messages = place_marks(messages, len(images))
    for number, message in enumerate(messages):
        if message.role != "system" and not message.content.strip():
            raise DataError(f"turn {number} ({message.role}) is empty; expected text")
    used = {*used, answer_column, *_IMAGE_COLUMNS, *_BEFORE_COLUMNS} - columns.keys()
    used |= {*columns.values()}
    left = {k: v for k, v in row.items() if k not in used and v is not None}
    named = COLUMNS.union(_REFUSED_COLUMNS)
    metadata = {k: v for k, v in left.items() if (_is_given(v) or k not in named) and is_json(k, v)}
    return Record(messages, answers[0] if answers else None, images, metadata, answers[1:], info)


def _renamed(row: Mapping[str, Any], columns: Mapping[str, str]) -> Mapping[str, Any]:
    """Move mapped columns to their names and remove their alternatives."""
    found = {name: _look_up(row, path) for name, path in columns.items()}
    for name, value in found.items():
        if value is None and name not in _IMAGE_COLUMNS:
            raise DataError(
                f"nothing at {columns[name]}, which is mapped to the column {name}; the row has "
                f"{_columns(row)}"
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
    return bool(value.strip()) if isinstance(value, str) else value not in (None, [], (), {})


def _conversation(
    row: Mapping[str, Any], alpaca_gap: str
) -> tuple[tuple[Message, ...], list[Any], set[str]]:
    """Return the messages, the images inside them, and the columns they were read from."""
    lists = (*_TURN_COLUMNS, *(("prompt",) if not isinstance(row.get("prompt"), str) else ()))
    column = next((c for c in lists if _is_given(row.get(c))), None)
    images: list[Any] = []
    if column is None:
        messages, used = _single_turn(row, alpaca_gap)
        messages = [*_history(row), *messages]
    elif _is_given(row.get("history")):
        raise DataError(f"both {column} and history; put all turns into {column}")
    elif not isinstance(row[column], list | tuple):
        raise DataError(f"{column} is {shown(row[column])}; expected a list of turns")
    else:
        messages, used = [_message(turn, images) for turn in row[column]], {column}
    return checked_turns((*_system(row, messages), *messages)), images, used


def _single_turn(row: Mapping[str, Any], alpaca_gap: str) -> tuple[list[Message], set[str]]:
    """Return the turns of a row with separate text columns, and these columns."""
    for column in _TEXT_COLUMNS:
        if _is_given(row.get(column)):
            return [Message("user", _string(row, column))], {column}
    asked = [_string(row, c) for c in ("instruction", "input") if _is_given(row.get(c))]
    if asked and _is_given(row.get("output")):
        turns = [
            Message("user", alpaca_gap.join(asked)),
            Message("assistant", _string(row, "output")),
        ]
        return turns, {*_ALPACA_COLUMNS}
    raise DataError(
        f"columns {_columns(row)}; expected problem or question (with answer or solution), "
        "messages or conversations, or instruction and output, and not empty"
    )


def _history(row: Mapping[str, Any]) -> list[Message]:
    """Return alpaca's earlier turns, a list of (question, answer) pairs."""
    pairs = row["history"] if _is_given(row.get("history")) else []
    if not isinstance(pairs, list | tuple) or not all(
        isinstance(p, list | tuple) and len(p) == 2 and all(isinstance(t, str) for t in p)
        for p in pairs
    ):
        raise DataError(f"history is {shown(pairs)}; expected [[question, answer], …]")
    return [Message(role, p[i]) for p in pairs for i, role in enumerate(("user", "assistant"))]


def _system(row: Mapping[str, Any], messages: Sequence[Message]) -> list[Message]:
    """Return the system turn of the column `system`, unless the conversation has the same one."""
    if not _is_given(row.get("system")):
        return []
    text = _string(row, "system")
    if not messages or messages[0].role != "system":
        return [Message("system", text)]
    if messages[0].content.strip() != text.strip():
        raise DataError("the column system and the conversation's system turn differ; keep one")
    return []


def _message(turn: Any, images: list[Any]) -> Message:
    """Convert a turn, `{"role", "content"}` or sharegpt's `{"from", "value"}`.

    The content is a string, or a list of parts as in OpenAI's API, in whose texts `<image>` is not
    a mark.
    """
    if isinstance(turn, Mapping):
        role = turn.get("from") if turn.get("role") is None else turn["role"]
        content = turn.get("value") if turn.get("content") is None else turn["content"]
        if isinstance(role, str):
            role = _SHAREGPT_ROLES.get(role, role)
            if isinstance(content, str):
                return Message(role, content)
            if isinstance(content, list | tuple) and content:
                return Message(role, "".join(_part(p, role, images) for p in content))
        turn = f"role {shown(role)}, content {shown(content)}"
    expected = "expected {role, content} as strings, or content as parts"
    raise DataError(f"turn {shown(turn)}; {expected}")


def _part(part: Any, role: str, images: list[Any]) -> str:
    """Return the text of a part, or a mark; an image inside the part is appended to `images`."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind in _TEXT_PARTS and isinstance(part.get("text"), str):
        return part["text"] if role == "assistant" else escape_marks(part["text"])
    if kind not in _IMAGE_PARTS:
        what = f"of type {shown(kind)}" if isinstance(part, Mapping) else shown(part)
        expected = '{"type": "text", "text": …} or {"type": "image"}'
        raise DataError(f"a part {what} in the content; expected {expected}")
    if role == "assistant":
        why = "a model that writes text shows no images"
        raise DataError(f"an image part in an assistant turn; {why}")
    found = next((part[f] for f in _IMAGE_FIELDS if part.get(f) is not None), None)
    found = found["url"] if isinstance(found, Mapping) and "url" in found else found
    if found is not None:  # otherwise the next image of the image column
        images.append(found)
    return IMAGE_MARK


def _image_files(
    row: Mapping[str, Any], inline: list[Any], folder: Path
) -> tuple[tuple[bytes, ...], tuple[ImageInfo, ...]]:
    """Return the images of a column, or those inside the turns, each decoded once on trial."""
    given = {c: row[c] for c in _IMAGE_COLUMNS if row.get(c) not in (None, [], ())}
    if len(given) == 2 and given["images"] in (given["image"], [given["image"]]):
        del given["image"]
    places = [*given, *(["the turns themselves"] if inline else [])]
    if len(places) > 1:
        raise DataError(f"images in {' and in '.join(places)}; keep only one of them")
    images = next(iter(given.values()), inline)
    images = images if isinstance(images, list | tuple) else [images]
    if len(images) > MAX_IMAGES:
        raise DataError(f"{len(images)} images, at most {MAX_IMAGES}")
    files, info = [], []
    for number, value in enumerate(images):
        with located(f"image {number}"):
            files.append(image_bytes(value, folder))
            info.append(image_info(files[-1]))
    return tuple(files), tuple(info)


def _columns(row: Mapping[str, Any]) -> str:
    return shown(sorted(map(str, row)), 200)


def _string(row: Mapping[str, Any], column: str) -> str:
    value = row[column]
    if not isinstance(value, str):
        raise DataError(f"{column} is {shown(value)}; expected a string")
    return value
