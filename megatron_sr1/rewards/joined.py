r"""Answers that join several values: `x=2 \text{ or } x=3`, `1331 \text{ and } 1728`.

In: a cleaned answer. Out: its parts and the word that joins them. Order has no meaning; the number
of parts has, so that an answer that hedges is never the single one that is right.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

_OR, _AND = r"\bor\b|\\(?:lor|vee)(?![A-Za-z])", r"\band\b|\\(?:land|wedge)(?![A-Za-z])"
_GAP = re.compile(rf"\s*[,;]?\s*(?:(?P<any>{_OR})|(?P<all>{_AND}))\s*|\s*[,;]\s*", re.IGNORECASE)
_SET = re.compile(r"\\\{(.*)\\\}", re.DOTALL)
_VALUE = re.compile(r"\d|[=<>]|\\[A-Za-z]")
_INEQUALITY = re.compile(r"[<>]|\\(?:[lg]e|ne|[lg]t)(?![a-z])")
_NAME = re.compile(r"([^=]+)=")


@dataclass(frozen=True)
class Joined:
    """Parts of an answer.

    Attributes:
        parts: one or more texts.
        word: "or" | "and"; "both" where both occur; "" for commas alone or a single part.
    """

    parts: tuple[str, ...]
    word: str = ""


def joined(cleaned: str) -> Joined:
    """Take an answer apart at "or", "and" and commas outside of brackets.

    Words between words are prose: "cat and dog" stays one part.

    Args:
        cleaned: what `answers.clean` returned.
    """
    inside = _SET.fullmatch(cleaned)
    text = inside[1] if inside else cleaned
    parts, words, start, seen, depth = [], set[str](), 0, 0, 0
    for gap in _GAP.finditer(text):
        depth += _opened(text[seen : gap.start()])
        seen = gap.end()
        if depth:
            continue
        parts.append(text[start : gap.start()].strip())
        words |= {"or"} if gap["any"] else {"and"} if gap["all"] else set()
        start = gap.end()
    parts.append(text[start:].strip())
    if len(parts) == 1 or not all(_VALUE.search(part) for part in parts):
        return Joined((cleaned,))
    return Joined(tuple(parts), "both" if len(words) == 2 else "".join(words))


def means_the_same(one: Joined, other: Joined) -> bool:
    """Whether two lists of as many parts are joined in the same sense.

    A comma leaves it open. "x = 2 and x = 3" lists the same solutions as "x = 2 or x = 3"; for
    inequalities, and for equations of several names, the words differ.
    """
    if len(one.parts) != len(other.parts):
        return False
    if one.word == other.word or not one.word or not other.word:
        return True
    parts = (*one.parts, *other.parts)
    names = {found[1].strip() for part in parts if (found := _NAME.match(part))}
    return len(names) <= 1 and not any(_INEQUALITY.search(part) for part in parts)


def match_parts(
    golds: tuple[str, ...], answers: tuple[str, ...], same: Callable[[str, str], bool]
) -> bool:
    """Whether each gold part has an answer part of its own, in any order.

    Args:
        golds: parts.
        answers: as many.
        same: whether a gold part and an answer part are equal.
    """
    left = list(answers)
    for gold in golds:
        found = next((n for n, answer in enumerate(left) if same(gold, answer)), None)
        if found is None:
            return False
        del left[found]
    return True


def _opened(text: str) -> int:
    """Brackets that a text opens less those that it closes; the pair of `[0, 1)` counts too."""
    return sum((c in "([{") - (c in ")]}") for c in text)
