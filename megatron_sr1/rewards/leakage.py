r"""Detect descriptions that state the answer as a conclusion instead of what the image shows.

A description must contain the value asked for if the image shows it (a digit, a colour, a label),
so that alone is not a leak. A leak is a marked answer, a description that consists of the answer
alone, or a sentence that concludes with it: "the answer is 7", "option B is correct", "…, so 7.",
"3 + 4 = 7".

The patterns of such sentences have `{named}` in place of an option label and `{place}` in place of
an ordinal. Patterns of values are searched in case-folded text, those of labels in text as written,
since `a` is an article.
"""

from __future__ import annotations

import re
from functools import lru_cache

from megatron_sr1.rewards.answers import clean, number_spellings, question_options
from megatron_sr1.rewards.grader import gold_label
from megatron_sr1.rewards.response import DEFAULT_MARKS, Marks, bare_gold

MAX_SENTENCE_CHARACTERS = 300
_SENTENCE = re.compile(r"(?<=[.;!?\n])\s+|\n+")
_LATIN_WORD = re.compile(r"\b\w*[A-Za-z_]\w*")
_LOOK_ALIKES = str.maketrans(
    "\u0430\u0435\u043e\u0440\u0441\u0443\u0445\u0456\u0455\u03bf\u03b1\u0410\u0412\u0415\u041a"
    "\u041c\u041d\u041e\u0420\u0421\u0422\u0425\u0391\u0392\u0395\u0397\u0399\u039a\u039c\u039d"
    "\u039f\u03a1\u03a4\u03a7",
    "aeopcyxisoaABEKMHOPCTXABEHIKMNOPTX",
)
"""Cyrillic and Greek letters that look Latin, and are read as such in words with Latin letters."""
_NOUN = r"answer|solution|result|conclusion"
_IS = (
    r"(?: is| are| would(?: of course)? be| must be| should be| will be| has to be"
    r"|\s*(?:=|:|→|⇒|=>|->|-))"
)
_FOREIGN = (
    r"(?:(?:respuesta|resposta|risposta)(?: (?:correcta|correta|corretta))?|r[ée]ponse|"
    r"antwort|lösung|ответ)(?: (?:es|é|è|est|ist|lautet)|\s*[:=-])"
)
_CJK = r"(?:答案|答え|正解|选项|選項|정답|답)\s*(?:是|为|為|は|은|:|：)?"
_CHOSEN = (
    r"(?:correct(?: (?:option|choice|answer|label|letter|one))?"
    r"|(?:right|best) (?:option|choice|answer))"
)
_ANSWER = (
    rf"(?:\bans(?:wer)?(?: to (?:the|this) (?:question|problem))?{_IS}(?: therefore| thus)?:?"
    rf"|\b{_CHOSEN}(?: is| would(?: of course)? be|:)|\b{_FOREIGN}|{_CJK}"
    r"|(?:<|\[)answer(?:>|\])|####)"
)
"""Introduces an answer beyond doubt, whatever follows."""
_FILLER = r"(?: (?:exactly|clearly|simply|equal to|that of|option|choice|the number|the|an?))*"
_HENCE = r"(?:\b(?:so|therefore|thus|hence|consequently|accordingly|in conclusion)\b|∴)"
_OPERATION = r"\d\s*(?:\+|-|\*|/|x|\\times|\\cdot|times|plus|minus)\s*[\d(]"
_SUMMING = r"(?:adds?|sums?) (?:up )?to|amounts? to|comes? to|totals|total of|gives|yields|makes?"
_LAST_WORD = r"\b(?:final|finally|sum|verdict|output)\s*[:=]|∴"
_NOUN_IS = rf"\b(?:{_NOUN})(?: to (?:the|this) (?:question|problem))?{_IS}{_FILLER} ?"
_IS_NOUN = rf" (?:is|are|would be|must be) (?:the )?(?:final |correct |right )?(?:{_NOUN})"
"""Pictures contain results and solutions too, so the clause has to end after the value."""
_VALUE = (
    r"\b(?:value|number|word|thing|quantity)(?: (?:that|which)(?: is| was)?)? "
    r"(?:asked for|wanted|sought|requested|needed|in question) is ",
    r"(?:^|[.!?;\n]\s*|\band )(?:write|reply|respond|say|answer|put)(?: with)? [\"']?",
    r"\b(?:please|just|then|should|must) "
    r"(?:write|reply|respond|say|output|answer|put|return|enter|box|type)(?: with)? [\"']?",
)
"""Precede a value: the value asked for, and instructions to the reader."""
_LABEL = (
    r"(?i:\b(?:option|choice|answer))\s+{named}(?i:(?: is| seems| must be)?(?: the)? "
    r"(?:correct|right|true|best|matching)\b)",
    r"(?i:\b(?:choose|select|pick|mark|go(?:ing)? with|reply|answer(?: with)?)) "
    r"(?i:(?:option|choice|answer) )?{named}(?!\s+[a-z]+\b)",
    r"(?i:\b(?:is|match(?:es|ing)|fits|corresponds to|points to|agrees with) "
    r"(?:option|choice|answer)) {named}",
    r"{named} is (?:the )?(?:correct|(?:right|best) (?:option|choice|answer|one))\b",
    r"{named} it is\b",
    r"选择?\s*{named}",
)
_PLACES = ("first", "second", "third", "fourth", "fifth", "sixth")
_PLACE = (
    r"\b{place} (?:option|choice|answer)(?: is| seems)?(?: the)? (?:right|correct|best|fits|match)"
    r"|\b(?:choose|pick|select|mark) the {place}\b"
)


@lru_cache(maxsize=1024)  # responses of a group repeat each other
def states_answer(description: str, gold: str, question: str, marks: Marks = DEFAULT_MARKS) -> bool:
    """Return True if a description states the answer as a conclusion.

    Not detected: unusual phrases ("one gets 7"), exclusion ("not A, not C"), other spellings (XIV,
    28/2). docs/rewards.md has the measured recall.
    """
    if re.search(r"\\boxed\b", description) or marks.answer[0] in description:
        return True
    options = question_options(question)
    wanted = clean(bare_gold(gold))
    label = gold_label(wanted, options)
    values = [wanted]
    lines = filter(None, map(clean, description.splitlines()))
    text = _LATIN_WORD.sub(lambda word: word[0].translate(_LOOK_ALIKES), "\n".join(lines))
    if label is not None:
        values.append(options.get(label, ""))
        if _concludes_with_label(text, label):
            return True
        values = [v for v in values if v.strip("()[].: ").upper() != label]
    return any(_concludes_with_value(text.casefold(), value) for value in values if value)


def _concludes_with_value(text: str, value: str) -> bool:
    """Return True if a plain, case-folded text states a value as the answer."""
    words = (map(re.escape, v.casefold().split()) for v in number_spellings(value))
    spellings = "|".join(r"\s+".join(parts) for parts in words)  # any whitespace between words
    ends = r"(?!\.\d|,\d|\s*[-+*/=]\s*\d)"
    said = rf"(?:{spellings})(?![a-z0-9_]){ends}"
    apart = r"\s?".join(value) if value.isdigit() else said
    unit = r"(?: [a-z]+| ?[°%])?"
    stop = r"\s*(?:[.,;:!?)\n]|$|because\b|since\b)"
    return bool(
        re.fullmatch(rf"(?:(?:it|this|that)(?: is|'s) )?{said}\W*", text)
        or _follows(_ANSWER + _FILLER, rf"\s*[\"'(]?(?:{said}|{apart}(?!\s?\w){ends})", text)
        or _follows(_NOUN_IS, said + unit + stop, text)
        or (re.search(_IS_NOUN, text) and re.search(said + _IS_NOUN + unit + stop, text))
        or any(_follows(lead, said, text) for lead in _VALUE)
        or (value.casefold() in ("yes", "no") and re.match(rf"{said}\s*[,.!;]", text))
        or _derives_value(text, said, unit)
    )


def _derives_value(text: str, said: str, unit: str) -> bool:
    """Return True if a sentence draws a value as its conclusion, or the last one computes it."""
    sentences = _sentences(text)
    last = sentences[-1]
    concluded = rf",?(?: [^.;]*)? {said}{unit}\W*"
    if (
        any(re.match(_HENCE, s) and re.fullmatch(_HENCE + concluded, s) for s in sentences)
        or _follows(rf"(?:^|[,:] |\band ){_HENCE}", rf"{concluded}$", last)
        or _follows(rf"(?:{_LAST_WORD})", rf"\s*{said}{unit}\W*$", last)
    ):
        return True
    end = rf"\s*{said}{unit}[^\w\"']*$"
    if re.search(_OPERATION, last):
        result = _follows(r"(?:=|\bis|\bequals|\bmakes)", end, last)
        if result is not None and re.search(_OPERATION, last[: result.start()]):
            return True
    summed = _follows(rf"\b(?:{_SUMMING})", end, last)
    return summed is not None and len(re.findall(r"\d+", text)) > 2


def _follows(lead: str, rest: str, text: str) -> re.Match[str] | None:
    """Search a text for the pattern `lead` followed by the pattern `rest`, which contains a value.

    Compiling the whole takes milliseconds for each new value, so the lead is searched alone first.
    """
    return re.search(lead + rest, text) if re.search(lead, text) else None


def _concludes_with_label(text: str, label: str) -> bool:
    """Return True if a plain text states an option label as the answer."""
    named = rf"[(\[]?{label}[)\]]?(?![A-Za-z0-9_'])"
    option = rf"(?:option|choice|answer)\s+{named}"
    place = dict(zip("ABCDEF", _PLACES, strict=True)).get(label, "-")
    last = _sentences(text)[-1]
    return bool(
        re.fullmatch(rf"(?i:(?:the )?(?:(?:option|choice|answer)(?: is)?:? )?){named}\W*", text)
        or re.search(rf"(?i:{_ANSWER}{_FILLER})\s*{named}(?!\s+[a-z]+s?\b)", text)
        or re.search(rf"(?i:{_ANSWER})\s*{named}\s*(?:$|[.,;:)])", text)
        or any(re.search(pattern.format(named=named), text) for pattern in _LABEL)
        or re.search(_PLACE.format(place=place), text, re.IGNORECASE)
        or re.search(rf"(?:^|\.\s+|,\s+)(?i:{_HENCE}),?(?: [^.;]*)? {named}\W*$", text)
        or (label in last and re.fullmatch(rf"\W*(?:{option}|{named})\W*", last, re.IGNORECASE))
    )


def _sentences(text: str) -> list[str]:
    """Return the last characters of each sentence, so that patterns take linear time."""
    parts = (part.strip() for part in _SENTENCE.split(text))
    return [part[-MAX_SENTENCE_CHARACTERS:] for part in parts if part] or [""]
