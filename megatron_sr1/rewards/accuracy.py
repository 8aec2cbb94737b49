r"""The rules that decide whether an answer equals the gold one.

In: an answer, a gold answer, the question (for its options). Out: a verdict and the rule that gave
it. The first rule that applies decides: equal text, option labels, yes and no, lists joined by "or"
and "and", quantities with units, and finally algebra, in another process. Plain text is never
passed to algebra, where "AB" equals "BA", "CO2" equals "C2O" and "on" equals "no" as products.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from megatron_sr1.errors import GradingError
from megatron_sr1.rewards.answers import clean, quantity, same_quantity, split_unit, text_key
from megatron_sr1.rewards.options import (
    label_list,
    label_then_text,
    named_label,
    names_another,
    question_options,
)
from megatron_sr1.rewards.response import find_boxed

Compare = Callable[[str, str], bool]
"""Gold, answer -> equal as mathematics; `MathWorker.equal` with the name of the sample bound."""

MAX_MATH_CHARACTERS = 300
"""Longer text is prose and never passed to algebra."""
MAX_ANSWER_CHARACTERS = 2000
"""An answer longer than this plus twice the gold one is wrong without being read."""
MAX_NESTING = 10
"""Deeper nesting of brackets is not passed to algebra, whose grammar takes seconds to read it."""
_BARS = re.compile(r"(?:\|\s*){3}")
_COMMAND = re.compile(r"\\[A-Za-z]+")
_ENVIRONMENT = re.compile(r"\\(?:begin|end)\s*\{[A-Za-z]*\}")
_FUNCTION = re.compile(r"\b(?:sin|cos|tan|cot|sec|csc|log|ln|exp|sqrt|pi|arcsin|arccos|arctan)\b")
_NAMED = re.compile(r"[A-Za-z∠△\\][\w\s∠△\\{}']{0,30}?\s*=\s*([^=]+)")
_LEAD = re.compile(r"(?:the )?(?:final |correct )?answer(?: is|:)\s+(?=\S)", re.IGNORECASE)
_DATE = re.compile(r"\d{1,4}([-/])\d{1,2}\1\d{1,4}")
_RANGE = re.compile(r"\d+-\d+")
_FLAT_PREFIX = re.compile(r"(yes|no|true|false)\s*[,.;:]\s+(.+)", re.DOTALL)
_OR, _AND = r"\bor\b|\\(?:lor|vee)(?![A-Za-z])", r"\band\b|\\(?:land|wedge)(?![A-Za-z])"
_GAP = re.compile(rf"\s*[,;]?\s*(?:(?P<any>{_OR})|(?P<all>{_AND}))\s*|\s*[,;]\s*", re.IGNORECASE)
_SET = re.compile(r"\\\{(.*)\\\}", re.DOTALL)
_VALUE = re.compile(r"\d|[=<>]|\\[A-Za-z]")
_INEQUALITY = re.compile(r"[<>]|\\(?:[lg]e|ne|[lg]t)(?![a-z])")
_NAME = re.compile(r"([^=]+)=")


@dataclass(frozen=True)
class Verdict:
    """Whether an answer is right, which is also its truth value, and the rule that decided."""

    right: bool
    because: str

    def __bool__(self) -> bool:
        """Return `right`."""
        return self.right


def judge_answer(answer: str | None, gold: str, question: str, compare: Compare) -> Verdict:
    """Judge an answer.

    Args:
        answer: content of the box; None without a box.
        gold: as in the dataset; may be boxed.
        question: with its options.
        compare: called if no other rule applies.

    Raises:
        GradingError: the gold answer is empty, or `compare` failed.
    """
    wanted = clean(bare_gold(gold))
    if not wanted:
        raise GradingError(f"the gold answer is {gold!r}; expected some text to compare with")
    if answer is None:
        return Verdict(False, "no box")
    if is_runaway(answer, gold):
        return Verdict(False, "too long")
    given = _LEAD.sub("", clean(answer), count=1)
    if text_key(wanted) == text_key(given):
        return Verdict(True, "text")
    options = question_options(question)
    by_label = _labels_agree(wanted, given, options, compare)
    if by_label is not None:
        return Verdict(bool(by_label), "option")
    return _judge_value(wanted, given, compare)


def is_runaway(answer: str, gold: str) -> bool:
    """Return True if an answer is too long to be read."""
    return len(answer) > MAX_ANSWER_CHARACTERS + 2 * len(gold)


def bare_gold(gold: str) -> str:
    """Return a gold answer without its box, if it has one."""
    boxed = find_boxed(gold)
    return gold if boxed is None else boxed.content


def gold_label(cleaned_gold: str, options: Mapping[str, str]) -> str | None:
    """Return the label of the gold option, whether gold is the label, the text or both."""
    label, text = named_label(cleaned_gold) or ("", "")
    if label in options and (not text or text_key(clean(options[label])) == text_key(text)):
        return label
    # Without options a lower-case letter is a variable, not a label.
    if label and not options and cleaned_gold.strip("()[].:") == label:
        return label
    same = [
        label
        for label, text in options.items()
        if _same_value(cleaned_gold, clean(text), lambda gold, answer: gold == answer)
    ]
    return same[0] if len(same) == 1 else None


def _labels_agree(
    wanted: str, given: str, options: Mapping[str, str], compare: Compare
) -> bool | None:
    """Compare option labels; None if that does not decide."""
    several = label_list(wanted, options)
    if several is not None:
        named_several = label_list(given, options)
        if named_several is None:
            return None
        # Letters without separators may be a name, in which order matters: AB is not BA.
        run_together = wanted.isalpha() and given.isalpha()
        return not run_together and sorted(several) == sorted(named_several)
    label, named = gold_label(wanted, options), named_label(given)
    if label is None:
        # Gold is not a known option, but "(B) cat" still means "cat".
        return _same_value(wanted, clean(named[1]), compare) or None if named else None
    named = named or label_then_text(given, options)
    if named is None or (options and named[0] not in options):
        return _is_text_of(label, given, options, compare)
    return named[0] == label and not names_another(clean(named[1]), label, options)


def _is_text_of(label: str, given: str, options: Mapping[str, str], compare: Compare) -> bool:
    """Return True if an answer means this option's text and no other: 5 is neither 5 cm nor 5 m."""
    text = clean(options.get(label, ""))
    if not text or text_key(text) == text_key(given):
        return bool(text)
    others = (clean(other) for name, other in options.items() if name != label)
    return _same_value(text, given, compare) and not any(
        _same_value(other, given, lambda gold, answer: gold == answer) for other in others
    )


def _same_value(wanted: str, given: str, compare: Compare) -> bool:
    return _judge_value(wanted, given, compare).right


def _judge_value(wanted: str, given: str, compare: Compare) -> Verdict:
    """Compare as text, yes or no, lists, quantities, or mathematics."""
    gold_key, key = text_key(wanted), text_key(given)
    if gold_key == key:
        return Verdict(True, "text")
    if gold_key in ("yes", "no", "true", "false"):
        flat = _FLAT_PREFIX.fullmatch(given.casefold())
        opposite = {"yes": "no", "no": "yes", "true": "false", "false": "true"}[gold_key]
        said = flat is not None and flat[1] == gold_key and opposite not in flat[2].split()
        return Verdict(said, "yes or no")
    if _RANGE.fullmatch(wanted) or _DATE.fullmatch(wanted) or _DATE.fullmatch(given):
        return Verdict(False, "range or date")  # algebra would see a difference or a quotient
    golds, answers = split_values(wanted), split_values(given)
    if golds.word or answers.word:
        if "\\pm" in wanted + given and len(golds.parts) != len(answers.parts):
            return _judge_single(", ".join(golds.parts), ", ".join(answers.parts), compare)
        is_same = have_same_sense(golds, answers) and match_parts(
            golds.parts, answers.parts, lambda gold, part: _same_value(gold, part, compare)
        )
        return Verdict(is_same, "list")
    return _judge_single(wanted, given, compare)


def _judge_single(wanted: str, given: str, compare: Compare) -> Verdict:
    """Compare as quantities or as mathematics."""
    wanted, given = _without_name(wanted, given)
    gold_quantity, given_quantity = (
        quantity(_number_word_to_digits(wanted)),
        quantity(_number_word_to_digits(given)),
    )
    if gold_quantity and given_quantity:
        return Verdict(same_quantity(gold_quantity, given_quantity), "quantity")
    if text_key(wanted) == text_key(given):
        return Verdict(True, "text")
    (wanted, gold_unit), (given, unit) = split_unit(wanted), split_unit(given)
    if gold_unit and unit and gold_unit != unit:
        return Verdict(False, "unit")
    if not _is_mathematics(wanted) or not _is_mathematics(given):
        return Verdict(False, "other text")
    return Verdict(compare(wanted, given), "algebra")


def _number_word_to_digits(cleaned: str) -> str:
    """Return a number word as digits; any other text unchanged."""
    key = text_key(cleaned)
    return key if key.isdigit() else cleaned


def _without_name(wanted: str, given: str) -> tuple[str, str]:
    """Reduce `AB = 5` to 5 if the other side has no name."""
    if ("=" in wanted) == ("=" in given):
        return wanted, given
    named = [_NAMED.fullmatch(side) for side in (wanted, given)]
    sides = zip(named, (wanted, given), strict=True)
    wanted, given = (found[1].strip() if found else side for found, side in sides)
    return wanted, given


def _is_mathematics(cleaned: str) -> bool:
    """Return True if algebra may read a text: it has digits or operators, but no prose or names."""
    if len(cleaned) > MAX_MATH_CHARACTERS or ":" in cleaned or _nesting(cleaned) > MAX_NESTING:
        return False
    if _BARS.search(cleaned):
        return False
    bare = _FUNCTION.sub(" ", _COMMAND.sub(" | ", _ENVIRONMENT.sub("|", cleaned)))
    if re.search(r"[A-Za-z]\d|\d\s+\d", bare):  # CO2, H2O and x1 are names; 7 8 is two numbers
        return False
    if re.search(r"(?<![^\s,;])[A-Za-z]{2,}(?![^\s,;])", bare):  # prose
        return False
    runs = re.findall(r"[A-Za-z]{3,}", bare)  # abc and xyz are products, others are names
    if any(not re.fullmatch(r"[abcxyz]{3}", run) for run in runs):
        return False
    return bool(re.search(r"[0-9=<>^_+*/|]|\\[A-Za-z]", cleaned))


def _nesting(text: str) -> int:
    deepest = depth = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    return deepest


@dataclass(frozen=True)
class ValueList:
    """The values of an answer, and the word that joins them.

    Order has no meaning, but the number of values has: an answer that hedges is wrong.

    Attributes:
        parts: one or more texts.
        word: "or" | "and" | "both"; "" for commas alone or a single part.
    """

    parts: tuple[str, ...]
    word: str = ""


def split_values(cleaned: str) -> ValueList:
    """Split an answer at "or", "and" and commas outside brackets.

    Prose, as in "cat and dog", stays a single part.
    """
    inside = _SET.fullmatch(cleaned)
    text = inside[1] if inside else cleaned
    parts, words, start, seen, depth = [], set[str](), 0, 0, 0
    for gap in _GAP.finditer(text):
        depth += _num_open(text[seen : gap.start()])
        seen = gap.end()
        if depth:
            continue
        parts.append(text[start : gap.start()].strip())
        words |= {"or"} if gap["any"] else {"and"} if gap["all"] else set()
        start = gap.end()
    parts.append(text[start:].strip())
    if len(parts) == 1 or not all(_VALUE.search(part) for part in parts):
        return ValueList((cleaned,))
    return ValueList(tuple(parts), "both" if len(words) == 2 else "".join(words))


def have_same_sense(one: ValueList, other: ValueList) -> bool:
    """Return True if two lists have as many parts, joined in the same sense.

    A comma can mean either. "x = 2 and x = 3" lists the same solutions as "x = 2 or x = 3"; for
    inequalities and for equations of several names, "and" and "or" differ.
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
    """Return True if each gold part equals another answer part, in any order."""
    left = list(answers)
    for gold in golds:
        found = next((n for n, answer in enumerate(left) if same(gold, answer)), None)
        if found is None:
            return False
        del left[found]
    return True


def _num_open(text: str) -> int:
    """Return opening minus closing brackets, of any kind, so that `[0, 1)` is balanced."""
    return sum((c in "([{") - (c in ")]}") for c in text)
