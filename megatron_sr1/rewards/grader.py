r"""The grader: whether an answer equals the gold one, and the rule that decided.

The first rule that applies decides: equal text, option labels, yes and no, lists joined by "or" and
"and", quantities with units, and finally algebra, in another process. Plain text is never passed to
algebra, where "AB" equals "BA", "CO2" equals "C2O" and "on" equals "no" as products.

An exception while an answer is read or compared makes it wrong, and the verdict names the
exception. Errors are raised only for a gold answer that cannot be compared with itself, for a
grading process that does not start, and, with a type of their own, for exceeded limits of time and
memory.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from operator import eq

from megatron_sr1.errors import GradingError
from megatron_sr1.rewards.answers import (
    all_paired,
    clean,
    label_list,
    label_then_text,
    named_label,
    names_another,
    quantity,
    question_options,
    same_quantity,
    split_unit,
    text_key,
)
from megatron_sr1.rewards.math_worker import MathWorker, Uncomparable
from megatron_sr1.rewards.response import bare_gold

Compare = Callable[[str, str], bool]
"""Gold, answer -> equal as mathematics."""

GRADERS = ("rules", "math_verify")
UNCOMPARABLE = "uncomparable: "
"""Prefix of a verdict's reason if reading or comparing the answer raised; the exception follows."""
MAX_MATH_CHARACTERS = 300
"""Longer text is prose and never passed to algebra."""
MAX_ANSWER_CHARACTERS = 2000
"""An answer longer than this plus twice the gold one is wrong without being read."""
MAX_NESTING = 10
"""Deeper nesting of brackets is not passed to algebra, whose grammar takes seconds to read it."""
MAX_KNOWN = 4096
"""Verdicts that are kept, for the equal answers of a group."""
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
    """Whether an answer is right, and the rule that decided."""

    right: bool
    because: str


class Grader:
    """Judge answers by the rules of this file, or by math-verify alone."""

    def __init__(self, kind: str, timeout_seconds: float) -> None:
        """Set the kind, one of GRADERS, and the limit of a comparison, > 0; starts no process."""
        assert kind in GRADERS, kind
        self._kind = kind
        self._known: dict[tuple[str | None, str, str], Verdict] = {}
        self.worker = MathWorker(timeout_seconds, grader=kind)

    def judge(self, answer: str | None, gold: str, question: str, sample_name: str) -> Verdict:
        """Judge the content of a box, None without one; messages name the sample.

        The gold answer may be boxed; the question contains its options. Equal answers to a question
        are judged once.

        Raises:
            GradingLimit: a comparison exceeded the time or memory limit.
            GradingError: the gold answer is empty or cannot be compared with itself, or the
                grading process does not start.
        """
        key = answer, gold, question
        if key not in self._known:
            verdict = self._judge(answer, gold, question, sample_name)
            if len(self._known) >= MAX_KNOWN:
                self._known.clear()
            self._known[key] = verdict
        return self._known[key]

    def _judge(self, answer: str | None, gold: str, question: str, sample_name: str) -> Verdict:
        """Judge an answer that is not known yet."""
        compare = partial(self.worker.equal, sample_name=sample_name)
        problem = f"{sample_name}: the gold answer "

        def judge(answer: str | None) -> Verdict:
            by_rules, wanted = self._kind == "rules", bare_gold(gold).strip()
            if not (clean(wanted) if by_rules else wanted):
                raise GradingError(f"{problem}is {gold!r}; expected some text to compare with")
            if by_rules:
                return judge_answer(answer, gold, question, compare)
            unread = _judge_unread(answer, gold)
            return unread or Verdict(compare(wanted, answer or ""), "math_verify")

        try:
            return judge(answer)
        except GradingError:
            raise
        except Uncomparable as error:
            return Verdict(False, f"{UNCOMPARABLE}{error}")
        except Exception as error:  # raised by a rule, in this process
            raised = f"{type(error).__name__}: {error}"
        try:
            judge(bare_gold(gold))
        except GradingError:
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            raise GradingError(
                f"{problem}{gold!r} cannot be compared with itself: {reason}"
            ) from error
        return Verdict(False, f"{UNCOMPARABLE}{raised}")


def judge_answer(answer: str | None, gold: str, question: str, compare: Compare) -> Verdict:
    """Judge the content of a box by the rules; `compare` is called if no other rule applies."""
    if unread := _judge_unread(answer, gold):
        return unread
    assert answer is not None
    wanted, given = clean(bare_gold(gold)), _LEAD.sub("", clean(answer), count=1)
    if text_key(wanted) == text_key(given):
        return Verdict(True, "text")
    options = question_options(question)
    by_label = _labels_agree(wanted, given, options, compare)
    if by_label is not None:
        return Verdict(bool(by_label), "option")
    return _judge_value(wanted, given, compare)


def _judge_unread(answer: str | None, gold: str) -> Verdict | None:
    """Judge an answer that is missing or too long; None for others."""
    if answer is None:
        return Verdict(False, "no box")
    is_long = len(answer) > MAX_ANSWER_CHARACTERS + 2 * len(gold)
    return Verdict(False, "too long") if is_long else None


def gold_label(cleaned_gold: str, options: Mapping[str, str]) -> str | None:
    """Return the label of the gold option, whether gold is the label, the text or both."""
    label, text = named_label(cleaned_gold) or ("", "")
    if label in options and (not text or text_key(options[label]) == text_key(text)):
        return label
    # Without options a lower-case letter is a variable, not a label.
    if label and not options and cleaned_gold.strip("()[].:") == label:
        return label
    same = [name for name, text in options.items() if _same_value(cleaned_gold, text, eq)]
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
    text = options.get(label, "")
    if not text or text_key(text) == text_key(given):
        return bool(text)
    others = (other for name, other in options.items() if name != label)
    is_same = _same_value(text, given, compare)
    return is_same and not any(_same_value(other, given, eq) for other in others)


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
    (golds, gold_word), (answers, word) = _split_values(wanted), _split_values(given)
    if gold_word or word:
        if "\\pm" in wanted + given and len(golds) != len(answers):
            return _judge_single(", ".join(golds), ", ".join(answers), compare)
        # A comma can mean either word.
        fits = gold_word == word or not gold_word or not word or _and_is_or(golds + answers)
        same = partial(_same_value, compare=compare)
        return Verdict(fits and all_paired(golds, answers, same), "list")
    return _judge_single(wanted, given, compare)


def _judge_single(wanted: str, given: str, compare: Compare) -> Verdict:
    """Compare as quantities or as mathematics."""
    if ("=" in wanted) != ("=" in given):  # AB = 5 is 5 if the other side has no name
        sides = ((_NAMED.fullmatch(side), side) for side in (wanted, given))
        wanted, given = (found[1].strip() if found else side for found, side in sides)
    # A number word is its digits in the key.
    keys = [(text_key(side), side) for side in (wanted, given)]
    one, other = (quantity(key if key.isdigit() else side) for key, side in keys)
    if one and other:
        return Verdict(same_quantity(one, other), "quantity")
    if keys[0][0] == keys[1][0]:
        return Verdict(True, "text")
    (wanted, gold_unit), (given, unit) = split_unit(wanted), split_unit(given)
    if gold_unit and unit and gold_unit != unit:
        return Verdict(False, "unit")
    if not _is_mathematics(wanted) or not _is_mathematics(given):
        return Verdict(False, "other text")
    return Verdict(compare(wanted, given), "algebra")


def _is_mathematics(cleaned: str) -> bool:
    """Return True if algebra may read a text: it has digits or operators, but no prose or names."""
    if len(cleaned) > MAX_MATH_CHARACTERS or ":" in cleaned or _BARS.search(cleaned):
        return False
    if max(_depths(cleaned)) > MAX_NESTING:
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


def _depths(text: str) -> list[int]:
    """Return the depth of brackets, of any kind, so that `[0, 1)` is balanced, from 0 on."""
    steps = ((c in "([{") - (c in ")]}") for c in text)
    return list(accumulate(steps, initial=0))


def _split_values(cleaned: str) -> tuple[list[str], str]:
    """Split an answer at "or", "and" and commas outside brackets.

    Order has no meaning, but the number of values has: an answer that hedges is wrong. Prose, as in
    "cat and dog", stays a single part.

    Returns:
        one or more parts, and the word that joins them: or | and | both; "" for commas or one part.
    """
    inside = _SET.fullmatch(cleaned)
    text = inside[1] if inside else cleaned
    parts, words, start, depths = [], set[str](), 0, _depths(text)
    for gap in _GAP.finditer(text):
        if depths[gap.start()]:
            continue
        parts.append(text[start : gap.start()].strip())
        words |= {"or"} if gap["any"] else {"and"} if gap["all"] else set()
        start = gap.end()
    parts.append(text[start:].strip())
    if len(parts) == 1 or not all(_VALUE.search(part) for part in parts):
        return [cleaned], ""
    return parts, "both" if len(words) == 2 else "".join(words)


def _and_is_or(parts: list[str]) -> bool:
    """Return True if the word that joins the parts does not matter.

    "x = 2 and x = 3" lists the same solutions as "x = 2 or x = 3"; for inequalities and for
    equations of several names, "and" and "or" differ.
    """
    names = {found[1].strip() for found in map(_NAME.match, parts) if found}
    return len(names) <= 1 and not any(_INEQUALITY.search(part) for part in parts)
