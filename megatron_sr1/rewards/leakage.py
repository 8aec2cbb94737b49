"""Whether a description states the answer as a verdict instead of describing.

A description must hold what the image shows, and the answer may be among it: a digit that is in
the picture is no leak. A leak is a *verdict*: a box, "the answer is 7", "option B is correct",
"3 + 4 = 7" where the sum was asked for. Counted always; unpaid where the configuration says so.
"""

from __future__ import annotations

import re

from megatron_sr1.rewards.accuracy import normalise, option_letter
from megatron_sr1.rewards.parsing import BOX

_VALUE = r"[\"'*$(\s]*(?P<value>[^\s.,;:!?\"'*$)]+(?:[.,/]\d+)*)"
_VERDICTS = tuple(
    re.compile(pattern + _VALUE, re.IGNORECASE)
    for pattern in (
        r"\b(?:final|correct|right)?\s*answer\s*(?:is|was|would be|should be|must be|:|=)",
        r"\b(?:final|correct|right)\s+(?:option|choice|result|solution)\s*(?:is|:|=)",
        r"\b(?:therefore|thus|hence|consequently|so)\b,?\s*"
        r"(?:it is|it's|we get|we have|the \w+ is)",
        r"\b(?:result|solution|conclusion)\s*(?:is|:|=)",
        r"\d\s*(?:[-+*/×÷]\s*\d+(?:\.\d+)?\s*)+=",
    )
)
_LETTER = re.compile(
    r"\b(?:option|choice|answer)\s*\(?(?P<value>[A-Z])\)?\s*(?:is|would be)\s*(?:the\s+)?"
    r"(?:correct|right|true|best)|"
    r"\(?\b(?P<other>[A-Z])\b\)?\s+is\s+(?:the\s+)?(?:correct|right)\b"
)


def states_answer(description: str, gold: str, question: str) -> bool:
    """Whether a description gives the gold answer away as a verdict.

    Args:
        description: text inside the span.
        gold: the right answer.
        question: as asked, options included.
    """
    if BOX in description:
        return True
    wanted = {normalise(gold)}
    letter = option_letter(gold)
    if letter:
        wanted.add(letter.lower())
    found = [m["value"] for pattern in _VERDICTS for m in pattern.finditer(description)]
    if letter:
        found += [m["value"] or m["other"] for m in _LETTER.finditer(description)]
    if any(normalise(value) in wanted for value in found):
        return True
    # An answer of several words: look for it whole behind a verdict.
    text = normalise(gold)
    if " " not in text:
        return False
    told = normalise(description)
    return bool(re.search(rf"\banswer\s*(?:is|:|=)\s*[\"'*(]*{re.escape(text)}\b", told))
