"""Options of a multiple-choice question, and the labels that answers name.

In: the question's text, an answer's text. Out: label -> option text; the label that an answer
names and what it says besides.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from megatron_sr1.rewards.answers import clean, text_key

_MARKS = (
    re.compile(r"(?<![A-Za-z0-9\\])[(\[]([A-Za-z])[)\]]\s*[:.]?"),
    re.compile(r"(?m)(?:^[ \t*]*|(?<=[\s,;:]))([A-Z])\s?[.):](?![A-Za-z]\.)"),
    re.compile(r"(?m)^[ \t*]*([A-Z])[ \t]+[-–][ \t]+"),
)
"""(A) and [A]; A. and A) and A: at the start of a line or behind a space; A - in a line."""
_LABEL_ALONE = re.compile(
    r"(?:(?:the )?(?:correct )?(?:option|choice|answer)(?: is)?:? )?[(\[]?([A-Za-z])[)\]]?[.:]?",
    re.IGNORECASE,
)
_LABEL_AND_TEXT = (
    re.compile(r"(?:(?:option|choice) )?[(\[]([A-Za-z])[)\]]\s*[:.\-]?\s*(\S.*)", re.I | re.S),
    re.compile(r"(?:(?:option|choice) )?([A-Za-z])(?:[.):]\s*| - )(?<!\.)(\S.*)", re.I | re.S),
    re.compile(r"(?:(?:option|choice) )?([A-Za-z])\.\s+(\S.*)", re.I | re.S),
)
_LABEL_THEN_TEXT = re.compile(r"([A-Za-z])(?:,\s*|\s+)(\S.*)", re.DOTALL)
_OTHER_LABEL = re.compile(
    r"(?<![\w\\])(?:[(\[]([A-Za-z])[)\]]|([A-Z])[.):](?!\w)|(?:or|and) ([A-Z])(?!\w))|^([A-Z])$"
)
_LIST_GAP = re.compile(r"\s*(?:,|;|/|&|\band\b)\s*", re.IGNORECASE)


def question_options(question: str) -> dict[str, str]:
    """Options that a question lists, labels A, B, … in order; empty if there are not two.

    The last such list counts. An option ends where the next begins, the last one with its line.

    Args:
        question: as asked.
    """
    best: list[re.Match[str]] = []
    for mark in _MARKS:
        chain: list[re.Match[str]] = []
        for found in mark.finditer(question):
            label = found[1].upper()
            if label == "A":
                chain = [found]
            elif chain and ord(label) == ord(chain[-1][1].upper()) + 1:
                chain.append(found)
            if len(chain) > 1 and (len(chain) >= len(best) or best[0].re is mark):
                best = chain
    options = {}
    for place, found in enumerate(best):
        is_last = place + 1 == len(best)
        end = len(question) if is_last else best[place + 1].start()
        text = question[found.end() : end].strip()
        options[found[1].upper()] = (text.split("\n")[0] if is_last else text).strip(" ,;\n*")
    return options


def named_label(cleaned: str) -> tuple[str, str] | None:
    """The option label that an answer names, upper case, and the text that goes with it.

    `A`, `(A)`, `A.`, `option A` and the like name A with no text; `A. foo`, `(A) foo` with one.
    `A foo` names nothing: that is an article.

    Args:
        cleaned: what `answers.clean` returned.
    """
    alone = _LABEL_ALONE.fullmatch(cleaned)
    if alone:
        return alone[1].upper(), ""
    for pattern in _LABEL_AND_TEXT:
        found = pattern.fullmatch(cleaned)
        if found:
            return found[1].upper(), found[2].strip()
    return None


def label_then_text(cleaned: str, options: Mapping[str, str]) -> tuple[str, str] | None:
    """`B cat` and `B, cat` name B where cat is the text of option B, and nothing otherwise.

    Args:
        cleaned: what `answers.clean` returned.
        options: of the question.
    """
    found = _LABEL_THEN_TEXT.fullmatch(cleaned)
    if found is None:
        return None
    label, text = found[1].upper(), found[2]
    return (label, text) if text_key(clean(options.get(label, ""))) == text_key(text) else None


def names_another(said: str, label: str, options: Mapping[str, str]) -> bool:
    """Whether the text behind a label names another option, by label or by text.

    Args:
        said: behind the label, cleaned.
        label: that was named.
        options: of the question; may be empty.
    """
    key, own = text_key(said), text_key(clean(options.get(label, "")))
    if not key or key == own:
        return False
    for found in _OTHER_LABEL.finditer(said):
        letter = next(group for group in found.groups() if group).upper()
        if letter != label and (not options or letter in options):
            return True
    others = {text_key(clean(text)) for other, text in options.items() if other != label}
    return any(
        other and other not in own and re.search(rf"(?<!\w){re.escape(other)}(?!\w)", key)
        for other in others
    )


def label_list(cleaned: str, options: Mapping[str, str]) -> list[str] | None:
    """Labels of an answer that names several: `A, C`, `A and C`; run together only as options.

    Args:
        cleaned: what `answers.clean` returned.
        options: of the question.
    """
    parts = [part.strip("() ") for part in _LIST_GAP.split(cleaned) if part.strip("() ")]
    if len(parts) > 1 and all(re.fullmatch(r"[A-Z]", part) for part in parts):
        return parts
    letters = list(cleaned)
    if 1 < len(letters) == len(set(letters)) and all(letter in options for letter in letters):
        return letters
    return None
