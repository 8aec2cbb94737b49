"""Options of a multiple-choice question, and the labels that answers name.

In: the text of a question or an answer. Out: label -> option text; the label that an answer names
and the text that comes with it. A parameter `cleaned` is text that `answers.clean` returned.
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
"""(A) or [A]; A. or A) or A: at the start of a line or after a space; "A - " starting a line."""
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
    """Return the options of the last list in a question, labels A, B, … -> text.

    Empty if there are fewer than two. An option ends where the next begins, the last at the end of
    its line.
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
    """Return the option label that an answer names, in upper case, and the text after it.

    `A`, `(A)`, `A.`, `option A` and the like have no text; `A. foo` and `(A) foo` have. `A foo` is
    an article and a noun: None.
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
    """Return label and text of `B cat` or `B, cat` if cat is the text of option B, else None."""
    found = _LABEL_THEN_TEXT.fullmatch(cleaned)
    if found is None:
        return None
    label, text = found[1].upper(), found[2]
    return (label, text) if text_key(clean(options.get(label, ""))) == text_key(text) else None


def names_another(cleaned: str, label: str, options: Mapping[str, str]) -> bool:
    """Return True if the text after a label names another option, by label or by text.

    Args:
        cleaned: the text after `label`.
        label: the label named first.
        options: of the question; may be empty.
    """
    key, labelled = text_key(cleaned), text_key(clean(options.get(label, "")))
    if not key or key == labelled:
        return False
    for found in _OTHER_LABEL.finditer(cleaned):
        letter = next(group for group in found.groups() if group).upper()
        if letter != label and (not options or letter in options):
            return True
    others = {text_key(clean(text)) for other, text in options.items() if other != label}
    return any(
        other and other not in labelled and re.search(rf"(?<!\w){re.escape(other)}(?!\w)", key)
        for other in others
    )


def label_list(cleaned: str, options: Mapping[str, str]) -> list[str] | None:
    """Return the labels in `A, C` or `A and C`, or in `AC` if A and C are options; else None."""
    parts = [part.strip("() ") for part in _LIST_GAP.split(cleaned) if part.strip("() ")]
    if len(parts) > 1 and all(re.fullmatch(r"[A-Z]", part) for part in parts):
        return parts
    letters = list(cleaned)
    if 1 < len(letters) == len(set(letters)) and all(letter in options for letter in letters):
        return letters
    return None
