"""Conversion of samples to and from the JSON objects that shards store.

In: a `Record` (text, answers, the original bytes of images), which rows.py creates from a source's
row. Out: the JSON object that shards.py writes, and the `Example` read back from it. Every error is
a `DataError` that names the sample.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_sr1.data.golds import MAX_GOLDS, gold_text
from megatron_sr1.data.guards import MAX_IMAGES, check_text, is_json, shown
from megatron_sr1.data.marks import place_marks
from megatron_sr1.errors import DataError
from megatron_sr1.records import Example, Message

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Record:
    """A sample to store.

    Attributes:
        messages: the conversation; its `<image>` marks refer to `images`, in order.
        answer: gold answer or None.
        images: original bytes of the image files.
        metadata: further columns, JSON values.
        other_answers: further gold answers, each of which is right.
    """

    messages: tuple[Message, ...]
    answer: str | None = None
    images: tuple[bytes, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)
    other_answers: tuple[str, ...] = ()


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
    """Convert a stored JSON object to an example.

    Raises:
        DataError: a field is missing or of the wrong type; names shard and sample.
    """
    where = f"{shard} sample {key}"
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
        reason = shown(f"{type(error).__name__}: {error}")
        raise DataError(
            f"{where}: not a stored sample ({reason}); make the shards with tools/make_shards.py"
        ) from None
    if not 0 <= num_images <= MAX_IMAGES:
        raise DataError(f"{where}: {num_images} images, at most {MAX_IMAGES}")
    messages = place_marks(checked_turns(messages, where), num_images, where)
    golds = [gold_text(a, where) for a in (answer, *others) if a is not None]
    golds = [gold for gold in golds if gold.strip()]  # an empty one cannot be compared with
    metadata = {k: v for k, v in metadata.items() if is_json({k: v})}
    first = golds[0] if golds else None
    return Example(index, key, shard, messages, first, num_images, metadata, tuple(golds[1:]))


def checked_turns(messages: tuple[Message, ...], where: str) -> tuple[Message, ...]:
    """Return the turns after checking their roles and text.

    Raises:
        DataError: unknown roles, no user turn, or text that cannot be tokenised.
    """
    roles = [m.role for m in messages]
    if any(role not in ROLES for role in roles) or "user" not in roles:
        raise DataError(
            f"{where}: roles {shown(roles)}; expected {', '.join(ROLES)} with at least one user "
            "turn",
            kind="roles other than system, user and assistant, or no user turn",
        )
    check_text("".join(m.content for m in messages), where)
    return messages
