r"""The parts of a response, and whether it has its recipe's format.

Source: Vision-SR1 (arXiv 2508.19652, section 3), whose responses have the form
`<description> … </description> <think> … </think> \boxed{…}`. `Marks` has the marks of these spans,
so that models with other ones can be used; where no configuration is at hand, they are these.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from megatron_sr1.config.rollout import BOXED, SpansConfig

Pair = tuple[str, str]
"""The opening and the closing mark of a span."""
BOX = ("\\boxed{", "}")
RECIPES = ("vision_sr1", "see_think", "vision_r1")
_BOXED = re.compile(r"\\boxed\s*\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)


@dataclass(frozen=True)
class Marks:
    """The marks of a response's spans.

    Attributes:
        think_first: the thoughts come before the description; their opening mark may be missing, as
            the prompt may end with it.
    """

    description: Pair = ("<description>", "</description>")
    think: Pair = ("<think>", "</think>")
    answer: Pair = BOX
    think_first: bool = False

    def blocks(self, recipe: str) -> tuple[Pair, ...]:
        """Return the marks of a recipe's blocks before the answer, in order."""
        if recipe == "vision_r1":
            return (self.think,)
        both = (self.description, self.think)
        return both[::-1] if self.think_first else both


DEFAULT_MARKS = Marks()


def marks_of(spans: SpansConfig) -> Marks:
    """Return the marks that a configuration names."""
    tags = {name: (f"<{name}>", f"</{name}>") for name in (spans.description, spans.think)}
    answer = (f"<{spans.answer}>", f"</{spans.answer}>") if spans.answer != BOXED else BOX
    return Marks(tags[spans.description], tags[spans.think], answer, spans.think_first)


@dataclass(frozen=True)
class Span:
    """Content of a span; `start` and `end` are offsets in the text that include its marks."""

    content: str
    start: int
    end: int


def find_description(text: str, marks: Marks = DEFAULT_MARKS) -> str | None:
    """Return the description once it is closed, stripped; None as for `description_span`."""
    span = description_span(text, marks)
    return None if span is None else span.content.strip()


def description_span(text: str, marks: Marks = DEFAULT_MARKS) -> Span | None:
    """Return the span of the description once it is closed.

    The result depends only on the text up to its closing mark: as a text grows, it changes from
    None to a description at most once and then stays, so that pass 2 can start at once.

    Returns:
        None if the marks are missing or unclosed, if the text between them is empty or contains
        another mark, or if a thought (with `think_first`, a second one) or an answer comes first.
    """
    start = 0
    if marks.think_first:
        thoughts, closing, _ = text.partition(marks.think[1])
        if not closing:
            return None
        start = len(thoughts) + len(closing)
    span = find_span(text, marks.description, start)
    if span is None or not span.content.strip():
        return None
    before = text[start : span.start]
    if any(mark in before or mark in span.content for mark in (*marks.description, *marks.think)):
        return None
    has_answer = _BOXED.search(before) if marks.answer == BOX else marks.answer[0] in before
    return None if has_answer else span


def find_span(text: str, marks: Pair, start: int = 0) -> Span | None:
    """Return the span from the first opening mark after `start` to the first closing one after."""
    opening, closing = marks
    start = text.find(opening, start)
    inside = start + len(opening)
    end = -1 if start < 0 else text.find(closing, inside)
    return None if end < 0 else Span(text[inside:end], start, end + len(closing))


@lru_cache(maxsize=512)  # grading a rollout asks for the boxes of its texts several times
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


def answer_span(text: str, marks: Marks = DEFAULT_MARKS) -> Span | None:
    """Return the span of the last answer; None if it is missing or not closed."""
    if marks.answer == BOX:
        return find_boxed(text)
    last = text.rfind(marks.answer[0])
    return None if last < 0 else find_span(text, marks.answer, last)


def find_answer(text: str, marks: Marks = DEFAULT_MARKS) -> str | None:
    """Return the stripped content of the last answer; None if it is missing or empty."""
    span = answer_span(text, marks)
    return None if span is None else span.content.strip() or None


def bare_gold(gold: str) -> str:
    """Return a gold answer without its box, if it has one."""
    boxed = find_boxed(gold)
    return gold if boxed is None else boxed.content


def has_format(text: str, recipe: str, marks: Marks = DEFAULT_MARKS) -> bool:
    """Return True if a response is the recipe's blocks and an answer, and nothing else.

    Source: the format reward of Vision-SR1 (arXiv 2508.19652, section 3.2). Each block occurs once,
    in order, and is not empty; whitespace between blocks is ignored. With `think_first`, the text
    may begin inside the thoughts.
    """
    blocks = marks.blocks(recipe)
    if marks.think_first and marks.think[0] not in text:
        text = marks.think[0] + text
    wanted = [mark for block in blocks for mark in block]
    if any(text.count(mark) != wanted.count(mark) for mark in (*marks.description, *marks.think)):
        return False
    answer = answer_span(text, marks)
    if answer is None:
        return False
    pattern = r"\s*".join(f"{opening}(.*){closing}" for opening, closing in blocks)
    found = re.fullmatch(rf"\s*{pattern}\s*", text[: answer.start], re.DOTALL)
    filled = found is not None and all(content.strip() for content in found.groups())
    return filled and bool(answer.content.strip()) and not text[answer.end :].strip()
