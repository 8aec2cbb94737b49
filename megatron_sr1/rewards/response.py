r"""The parts of a response, and whether it has its recipe's format.

Source: Vision-SR1 (arXiv 2508.19652, section 3), whose responses have the form
`<description> … </description> <think> … </think> \boxed{…}`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

DESCRIPTION = ("<description>", "</description>")
THINK = ("<think>", "</think>")
BLOCKS = {
    "vision_sr1": (DESCRIPTION, THINK),
    "see_think": (DESCRIPTION, THINK),
    "vision_r1": (THINK,),
}
"""Recipe -> the marked blocks before the boxed answer."""
_BOXED = re.compile(r"\\boxed\s*\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)


@dataclass(frozen=True)
class Span:
    """Content of a span; `start` and `end` are offsets in the text that include its marks."""

    content: str
    start: int
    end: int


def find_description(text: str) -> str | None:
    """Return the description once it is closed.

    The result depends only on the text up to the first closing mark: as a text grows, it changes
    from None to a description at most once and then stays, so that pass 2 can start at once.

    Returns:
        the text between the marks, stripped; None if they are missing or unclosed, if the text is
        empty or contains another mark, or if a thought or a boxed answer comes first.
    """
    span = find_span(text, DESCRIPTION)
    if span is None:
        return None
    before, inside = text[: span.start], span.content
    if any(mark in before or mark in inside for mark in (*DESCRIPTION, *THINK)):
        return None
    return None if _BOXED.search(before) else inside.strip() or None


def find_span(text: str, marks: tuple[str, str]) -> Span | None:
    """Return the span from the first opening mark to the first closing mark after it."""
    opening, closing = marks
    start = text.find(opening)
    inside = start + len(opening)
    end = -1 if start < 0 else text.find(closing, inside)
    return None if end < 0 else Span(text[inside:end], start, end + len(closing))


def find_boxed(text: str) -> Span | None:
    r"""Return the last `\boxed{…}` with its braces balanced; None if it is not closed."""
    starts = list(_BOXED.finditer(text))
    if not starts:
        return None
    last, depth = starts[-1], 1
    for brace in _BRACE.finditer(text, last.end()):
        depth += {"{": 1, "}": -1}.get(brace.group(), 0)  # an escaped brace is text
        if depth == 0:
            return Span(text[last.end() : brace.start()], last.start(), brace.end())
    return None


def find_answer(text: str) -> str | None:
    """Return the stripped content of the last boxed answer; None if it is missing or empty."""
    span = find_boxed(text)
    return None if span is None else span.content.strip() or None


def bare_gold(gold: str) -> str:
    """Return a gold answer without its box, if it has one."""
    boxed = find_boxed(gold)
    return gold if boxed is None else boxed.content


def has_format(text: str, recipe: str) -> bool:
    """Return True if a response is the recipe's blocks and a boxed answer, and nothing else.

    Source: the format reward of Vision-SR1 (arXiv 2508.19652, section 3.2). Each block occurs once,
    in order, and is not empty; whitespace between blocks is ignored.
    """
    marks = [mark for block in BLOCKS[recipe] for mark in block]
    if any(text.count(mark) != marks.count(mark) for mark in (*DESCRIPTION, *THINK)):
        return False
    boxed = find_boxed(text)
    if boxed is None:
        return False
    blocks = r"\s*".join(f"{opening}(.*){closing}" for opening, closing in BLOCKS[recipe])
    found = re.fullmatch(rf"\s*{blocks}\s*", text[: boxed.start], re.DOTALL)
    filled = found is not None and all(content.strip() for content in found.groups())
    return filled and bool(boxed.content.strip()) and not text[boxed.end :].strip()
