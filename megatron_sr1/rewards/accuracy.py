r"""Whether a boxed answer is the gold one.

In: a response, a gold answer, the question (for its options). Out: a verdict and the rule that gave
it. In this order, the first rule that applies decides: equal text, option labels, yes and no, lists
joined by "or" and "and", quantities with units, and last algebra, in another process. Text without
mathematics never meets algebra: "AB" is not "BA", "CO2" is not "C2O" and "on" is not "no", which as
symbolic products they would be.
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
from megatron_sr1.rewards.response import find_answer, find_boxed

Compare = Callable[[str, str], bool]
"""Gold, answer -> equal as mathematics; `MathWorker.equal` with the sample's name bound."""

MAX_MATH_CHARACTERS = 300
"""A longer answer is prose or runaway text, not the gold one, unless it is equal as text."""
MAX_ANSWER_CHARACTERS = 2000
"""An answer that is so much longer than the gold one is not read at all."""
MAX_NESTING = 10
"""Brackets and braces inside each other; deeper text costs the grammar seconds and says nothing."""
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
    """Whether an answer is right; true where it is.

    Attributes:
        right: the verdict.
        because: name of the rule that gave it, a few words.
    """

    right: bool
    because: str

    def __bool__(self) -> bool:
        """Whether the answer is right."""
        return self.right


def judge_answer(answer: str | None, gold: str, question: str, compare: Compare) -> Verdict:
    """Whether an answer, out of its box, is the gold one.

    Args:
        answer: text in the box; None where there is no box.
        gold: as the dataset has it; may itself be boxed.
        question: as asked, with its options.
        compare: settles what only algebra can.

    Raises:
        GradingError: there is no gold answer, or `compare` failed.
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


def same_answer(answer: str, gold: str, question: str, compare: Compare) -> bool:
    """Whether an answer, out of its box, is the gold one; as `judge_answer`."""
    return judge_answer(answer, gold, question, compare).right


def is_right(response_text: str, gold: str, question: str, compare: Compare) -> bool:
    """Whether a response's last boxed answer is the gold one; without a box it is wrong.

    Args:
        response_text: whole response.
        gold: as the dataset has it; may itself be boxed.
        question: as asked, with its options.
        compare: settles what only algebra can.
    """
    return judge_answer(find_answer(response_text), gold, question, compare).right


def is_runaway(answer: str, gold: str) -> bool:
    """Whether an answer is so long that it is not read."""
    return len(answer) > MAX_ANSWER_CHARACTERS + 2 * len(gold)


def bare_gold(gold: str) -> str:
    """A gold answer out of its box, if it has one."""
    boxed = find_boxed(gold)
    return gold if boxed is None else boxed.content


def is_label(cleaned_gold: str, options: Mapping[str, str]) -> bool:
    """Whether a gold answer is an option label, with or without the option's text."""
    named = named_label(cleaned_gold)
    if named is None:
        return False
    label, text = named
    if options:
        return label in options and (not text or text_key(clean(options[label])) == text_key(text))
    return cleaned_gold.strip("()[].:") == label  # a lower-case letter alone is a variable


def gold_label(cleaned_gold: str, options: Mapping[str, str]) -> str | None:
    """The label of the gold option, whether gold is the label or the option's text."""
    if is_label(cleaned_gold, options):
        named = named_label(cleaned_gold)
        assert named is not None
        return named[0]
    same = [
        label
        for label, text in options.items()
        if _same_value(cleaned_gold, clean(text), lambda gold, answer: gold == answer)
    ]
    return same[0] if len(same) == 1 else None


def _labels_agree(
    wanted: str, given: str, options: Mapping[str, str], compare: Compare
) -> bool | None:
    """Verdict by option labels; None where labels have no say."""
    several = label_list(wanted, options)
    if several is not None:
        named_several = label_list(given, options)
        if named_several is None:
            return None
        # Run together, without a list in sight, the order is part of the name: AB is not BA.
        run_together = wanted.isalpha() and given.isalpha()
        return not run_together and sorted(several) == sorted(named_several)
    label, named = gold_label(wanted, options), named_label(given)
    if label is None:
        # Gold is no option that we know of; "(B) cat" still says "cat".
        return _same_value(wanted, clean(named[1]), compare) or None if named else None
    named = named or label_then_text(given, options)
    if named is None or (options and named[0] not in options):
        return _is_text_of(label, given, options, compare)
    return named[0] == label and not names_another(clean(named[1]), label, options)


def _is_text_of(label: str, given: str, options: Mapping[str, str], compare: Compare) -> bool:
    """Whether an answer says an option's text, and that of no other: 5 is neither 5 cm nor 5 m."""
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
    """Equal as text, as yes or no, as a list, as quantities, or as mathematics."""
    gold_key, key = text_key(wanted), text_key(given)
    if gold_key == key:
        return Verdict(True, "text")
    if gold_key in ("yes", "no", "true", "false"):
        flat = _FLAT_PREFIX.fullmatch(given.casefold())
        opposite = {"yes": "no", "no": "yes", "true": "false", "false": "true"}[gold_key]
        said = flat is not None and flat[1] == gold_key and opposite not in flat[2].split()
        return Verdict(said, "yes or no")
    if _RANGE.fullmatch(wanted) or _DATE.fullmatch(wanted) or _DATE.fullmatch(given):
        return Verdict(False, "range or date")  # no differences and quotients
    golds, answers = joined(wanted), joined(given)
    if golds.word or answers.word:
        if "\\pm" in wanted + given and len(golds.parts) != len(answers.parts):
            return _judge_single(", ".join(golds.parts), ", ".join(answers.parts), compare)
        is_same = means_the_same(golds, answers) and match_parts(
            golds.parts, answers.parts, lambda gold, part: _same_value(gold, part, compare)
        )
        return Verdict(is_same, "list")
    return _judge_single(wanted, given, compare)


def _judge_single(wanted: str, given: str, compare: Compare) -> Verdict:
    """Equal as quantities or as mathematics."""
    wanted, given = _without_name(wanted, given)
    gold_quantity, given_quantity = quantity(gold_key_of(wanted)), quantity(gold_key_of(given))
    if gold_quantity and given_quantity:
        return Verdict(same_quantity(gold_quantity, given_quantity), "quantity")
    if text_key(wanted) == text_key(given):
        return Verdict(True, "text")
    (wanted, gold_unit), (given, unit) = split_unit(wanted), split_unit(given)
    if gold_unit and unit and gold_unit != unit:
        return Verdict(False, "unit")
    if not is_mathematics(wanted) or not is_mathematics(given):
        return Verdict(False, "other text")
    return Verdict(compare(wanted, given), "algebra")


def gold_key_of(cleaned: str) -> str:
    """A number word as digits; anything else as it is."""
    key = text_key(cleaned)
    return key if key.isdigit() else cleaned


def _without_name(wanted: str, given: str) -> tuple[str, str]:
    """`AB = 5` is 5 where the other side gives no name."""
    if ("=" in wanted) == ("=" in given):
        return wanted, given
    named = [_NAMED.fullmatch(side) for side in (wanted, given)]
    sides = zip(named, (wanted, given), strict=True)
    wanted, given = (found[1].strip() if found else side for found, side in sides)
    return wanted, given


def is_mathematics(cleaned: str) -> bool:
    """Whether algebra may be asked about a text: digits or operators, and no prose or names.

    Args:
        cleaned: what `answers.clean` returned.
    """
    if len(cleaned) > MAX_MATH_CHARACTERS or ":" in cleaned or _nesting(cleaned) > MAX_NESTING:
        return False
    if _BARS.search(cleaned):
        return False
    bare = _FUNCTION.sub(" ", _COMMAND.sub(" | ", _ENVIRONMENT.sub("|", cleaned)))
    if re.search(r"[A-Za-z]\d|\d\s+\d", bare):  # CO2, H2O, x1: names; 7 8: two numbers
        return False
    if re.search(r"(?<![^\s,;])[A-Za-z]{2,}(?![^\s,;])", bare):  # a word by itself: prose
        return False
    runs = re.findall(r"[A-Za-z]{3,}", bare)  # glued to something; a product is abc or xyz
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
