r"""Whether an answer is right: exact text, option letters, numbers, then math-verify.

In: the boxed answer, the gold answer, the question with its options. Out: a verdict. Most answers
are settled by comparing normalised text or exact numbers; only what holds mathematics goes to
math-verify, in a worker that can be killed. Pure words are never read as products of symbols, so
"AB" is not "BA".
"""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation

from megatron_sr1.rewards.worker import MathWorker

_LETTER_FORM = re.compile(
    r"(?:the\s+)?(?:(?:final|correct|right|best)\s+)?(?:answer|option|choice)?\s*(?:is|:)?\s*"
    r"(?:(?:option|choice)\s+)?"
    r"[(\[]?(?P<letter>[A-Ja-j])(?P<mark>[)\].:])?(?P<rest>\s.*|)",
    re.DOTALL,
)
_OPTION = re.compile(
    r"(?:^|\n|\s|,|;)\(?(?P<letter>[A-J])[).:]\s*(?P<text>.*?)(?=(?:\s|,|;)+\(?[A-J][).:]\s|\n|$)"
)
_WRAPPER = re.compile(r"\\(?:text|mathrm|textbf|mathbf|boxed|textit)\s*\{([^{}]*)\}")
_WORDS = re.compile(r"[^\W\d_]+(?:[\s\-'][^\W\d_]+)*")


def normalise(text: str) -> str:
    r"""Text without what carries no meaning: case, dollar signs, \text{}, a full stop, spaces."""
    text = _WRAPPER.sub(r"\1", text.strip())
    text = text.replace("\\$", "").replace("$", "").replace("\\%", "%").replace("\\ ", " ")
    text = text.replace("\\!", "").replace("\\,", "").replace("−", "-")
    text = re.sub(r"\s+", " ", text).strip().strip("\"'`*").strip()
    if text.endswith(".") and not text.endswith(".."):
        text = text[:-1].rstrip()
    return text.casefold()


def option_letter(text: str) -> str | None:
    """The option that an answer names, as "B" of "(B) cat", "B.", "the answer is B"; else None.

    A lower-case letter counts only alone or in brackets, as "a cat" is not option A.
    """
    match = _LETTER_FORM.fullmatch(text.strip().strip("$*").strip())
    if match is None:
        return None
    letter, mark, rest = match["letter"], match["mark"], match["rest"].strip()
    named = text.strip()[: match.start("letter")].strip("([ \t$*") != ""
    if rest and not mark and not (named and letter.isupper() and rest in {".", ")"}):
        return None
    if letter.islower() and (rest or named):
        return None
    return letter.upper()


def options(question: str) -> dict[str, str]:
    """Options of a question by letter, their texts normalised; at least A and B, or none."""
    found = {m["letter"]: normalise(m["text"]) for m in _OPTION.finditer(question)}
    return found if {"A", "B"} <= found.keys() else {}


def number(text: str) -> Decimal | None:
    """Exact value of a plain number ("1,234.50", "-3", "+2."), None for anything else."""
    plain = text.strip()
    if re.fullmatch(r"[-+]?\d{1,3}(?:,\d{3})+(?:\.\d*)?", plain):
        plain = plain.replace(",", "")
    if not re.fullmatch(r"[-+]?(?:\d+\.?\d*|\.\d+)", plain):
        return None
    try:
        return Decimal(plain)
    except InvalidOperation:
        return None


def is_right(answer: str | None, gold: str, question: str, worker: MathWorker, name: str) -> bool:
    """Whether an answer is right.

    Args:
        answer: content of the box; None if there was none, which is never right.
        gold: the right answer.
        question: as asked; options are looked up in it.
        worker: for mathematics.
        name: of the sample, for errors.

    Raises:
        GradingError: math-verify broke or ran out of time.
    """
    if answer is None or not answer.strip():
        return False
    ours, wanted = normalise(answer), normalise(gold)
    if ours == wanted:
        return True
    listed = options(question)
    gold_letter = option_letter(gold)
    if gold_letter and (listed or gold.strip().strip("().$") == gold_letter):
        return _is_option(answer, ours, gold_letter, listed)
    if wanted in listed.values():
        letter = option_letter(answer)
        return letter is not None and listed.get(letter) == wanted
    values = number(ours), number(wanted)
    if None not in values:
        return values[0] == values[1]
    if _WORDS.fullmatch(wanted) or _WORDS.fullmatch(ours):
        return False
    return worker.equal(gold, answer, name)


def _is_option(answer: str, ours: str, gold_letter: str, listed: dict[str, str]) -> bool:
    letter = option_letter(answer)
    if letter is not None:
        return letter == gold_letter
    return gold_letter in listed and ours == listed[gold_letter]
