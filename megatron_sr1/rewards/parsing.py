r"""Spans of a response: description, thought, boxed answer.

In: text as sampled, whole or still growing. Out: the text inside a span, or None. The form is
that of Vision-SR1 (arXiv 2508.19652, section 3):
`<description> … </description> <think> … </think> \boxed{…}`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

DESCRIPTION = ("<description>", "</description>")
THINK = ("<think>", "</think>")
_BOXED = re.compile(r"\\boxed\s*\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)


@dataclass(frozen=True)
class Span:
    """Content of a span and the text around it, as offsets: `start` and `end` hold the marks."""

    content: str
    start: int
    end: int


def find_description(text: str) -> str | None:
    """The description, once it has closed.

    It depends on the text up to the first closing mark alone: for a growing text it turns from
    None to a description at most once, and then never changes. So pass 2 may start at once.

    Args:
        text: response, whole or so far.

    Returns:
        the text between the marks, stripped; None where they are missing, unclosed, empty, hold
        another mark, or come behind a thought or a boxed answer.
    """
    span = find_span(text, DESCRIPTION)
    if span is None:
        return None
    before, inside = text[: span.start], span.content
    if any(mark in before or mark in inside for mark in (*DESCRIPTION, *THINK)):
        return None
    if _BOXED.search(before):
        return None
    return inside.strip() or None


def find_span(text: str, marks: tuple[str, str]) -> Span | None:
    """The span from the first opening mark to the first closing mark behind it.

    Args:
        text: any.
        marks: opening and closing mark.
    """
    opening, closing = marks
    start = text.find(opening)
    inside = start + len(opening)
    end = -1 if start < 0 else text.find(closing, inside)
    return None if end < 0 else Span(text[inside:end], start, end + len(closing))


def find_boxed(text: str) -> Span | None:
    r"""The last `\boxed{…}`, braces balanced; None if the last one is not closed.

    Args:
        text: any.
    """
    starts = list(_BOXED.finditer(text))
    if not starts:
        return None
    last = starts[-1]
    depth = 1
    for brace in _BRACE.finditer(text, last.end()):
        depth += {"{": 1, "}": -1}.get(brace.group(), 0)  # an escaped brace is text
        if depth == 0:
            return Span(text[last.end() : brace.start()], last.start(), brace.end())
    return None


def find_answer(text: str) -> str | None:
    """The content of the last boxed answer, stripped; None if there is none or it is empty."""
    span = find_boxed(text)
    return None if span is None else span.content.strip() or None
