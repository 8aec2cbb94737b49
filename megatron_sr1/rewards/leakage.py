r"""Whether a description states the answer as a verdict, instead of what the image shows.

In: a description, the gold answer, the question. Out: a flag. A description has to hold the value
that is asked for whenever the image does (a digit, a colour, a label); that is no leak. A leak
is a boxed answer, a description that is the answer and nothing else, or a sentence that gives it
as the conclusion: "the answer is 7", "option B is correct", "…, so 7.", "3 + 4 = 7".
"""

from __future__ import annotations

import re

from megatron_sr1.rewards.accuracy import bare_gold, gold_label
from megatron_sr1.rewards.answers import clean
from megatron_sr1.rewards.options import question_options

MAX_SENTENCE_CHARACTERS = 300
_VERDICT = (
    r"(?:answer|solution|result|conclusion)(?: to (?:the|this) (?:question|problem))?"
    r"(?: is| are| =| equals| would be| must be| should be| will be|:)(?: therefore| thus)?:?"
)
_CHOICE = r"(?:correct|right|best)(?: (?:option|choice|answer|label|letter))?(?: is| would be|:)"
_FILLER = r"(?: (?:exactly|clearly|simply|equal to|that of|option|choice|the number|the|an?))*"
_HENCE = r"(?:so|therefore|thus|hence|consequently|accordingly|in conclusion|overall)"
_SENTENCE = re.compile(r"(?<=[.;!?\n])\s+|\n+")
_OPERATION = r"\d\s*(?:\+|-|\*|/|x|\\times|\\cdot|times|plus|minus)\s*[\d(]"


def states_answer(description: str, gold: str, question: str) -> bool:
    """Whether a description gives the answer away as a verdict.

    Not covered: a verdict in words of its own ("everything adds up to 7").

    Args:
        description: text inside the description span.
        gold: as the dataset has it.
        question: as asked, with its options.
    """
    if re.search(r"\\boxed\b", description):
        return True
    options = question_options(question)
    wanted = clean(bare_gold(gold))
    label = gold_label(wanted, options)
    values = [wanted]
    if label is not None:
        values.append(clean(options.get(label, "")))
        if _label_is_verdict(description, label):
            return True
        values = [v for v in values if v.strip("()[].: ").upper() != label]
    return any(_value_is_verdict(description, value) for value in values if value)


def _value_is_verdict(description: str, value: str) -> bool:
    text = clean(description).casefold()
    said = rf"{_spelt(value)}(?![\w]|\.\d|,\d|\s*[-+*/=]\s*\d)"
    if re.fullmatch(rf"(?:(?:it|this|that)(?: is|'s) )?{said}\W*", text):
        return True
    if re.search(rf"\b(?:{_VERDICT}|{_CHOICE}){_FILLER} [\"'(]?{said}", text):
        return True
    sentences = _sentences(text)
    last = sentences[-1] if sentences else ""
    unit = r"(?: [a-z]+| ?[°%])?"
    concluded = rf"{_HENCE}\b,?(?: [^.;]*)? {said}{unit}\W*"
    if any(re.fullmatch(concluded, sentence) for sentence in sentences):
        return True
    if re.search(rf"(?:^|[,:] |\band ){concluded}$", last):
        return True
    makes = rf"(?:=|\bis|\bequals|\bmakes)\s*{said}{unit}[^\w\"']*$"
    result = re.search(makes, last)
    return result is not None and bool(re.search(_OPERATION, last[: result.start()]))


def _label_is_verdict(description: str, label: str) -> bool:
    text = clean(description)
    named = rf"[(\[]?{label}[)\]]?(?![\w'])"
    option = rf"(?:option|choice|answer)\s+{named}"
    ignore = re.IGNORECASE
    if re.fullmatch(rf"(?i:(?:the )?(?:(?:option|choice|answer)(?: is)?:? )?){named}\W*", text):
        return True
    if re.search(rf"(?i:\b(?:{_VERDICT}|{_CHOICE}){_FILLER}) {named}(?!\s+[a-z]+s?\b)", text):
        return True
    if re.search(rf"(?i:{_VERDICT}|{_CHOICE}) {named}\s*(?:$|[.,;:)])", text):
        return True
    right = r"(?: is| seems| must be)?(?: the)? (?:correct|right|true|best|matching)\b"
    if re.search(rf"(?i:\b(?:option|choice|answer))\s+{named}(?i:{right})", text):
        return True
    if re.search(
        rf"(?i:\b(?:choose|select|pick|mark)) (?i:(?:option|choice|answer) )?{named}", text
    ):
        return True
    if re.search(rf"(?:^|\.\s+|,\s+)(?i:{_HENCE})\b,?(?: [^.;]*)? {named}\W*$", text):
        return True
    last = _sentences(description.strip())[-1:] or [""]
    return bool(re.fullmatch(rf"\W*(?:{option}|{named})\W*", last[0], ignore)) and label in last[0]


def _sentences(text: str) -> list[str]:
    """Ends of the sentences: a verdict is short, and no pattern runs over a long text twice."""
    parts = (part.strip() for part in _SENTENCE.split(text))
    return [part[-MAX_SENTENCE_CHARACTERS:] for part in parts if part]


def _spelt(value: str) -> str:
    """A pattern for a value, blank space in it free."""
    return r"\s+".join(re.escape(word) for word in value.casefold().split())
