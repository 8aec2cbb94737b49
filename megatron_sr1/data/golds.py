r"""Extraction of gold answers from the ways in which data sets write them.

In: the value of a column: a text, a number, or a list of them, each of which is right. A text may
be a whole solution, whose answer follows `</think>`, is enclosed by `<answer>`, or follows `####`
or "The answer is" in the last line. Out: one text per answer. A solution without any of these
markers stays unchanged (the grader uses its last `\boxed{}`). A text that no response can match is
rejected.
"""

from __future__ import annotations

import math
import re
from decimal import Decimal
from typing import Any

from megatron_sr1.data.guards import check_text, shown
from megatron_sr1.errors import DataError

MAX_GOLDS = 64
"""Limit per sample; each is compared with each response."""
_TAG = re.compile(r"<(/?)answer>", re.IGNORECASE)
_SAID = re.compile(
    r"(?:^|[.!?] )(?:(?:so|thus|hence|therefore),? )?(?:the )?(?:final |correct )?"
    r"answer(?: is:?|:) (\S.*)$",
    re.IGNORECASE,
)
_NOTHING = re.compile(r"\\boxed|[\s${}]")
_TO_DO = "write the answer alone there, or name its column with --column answer=NAME"


def gold_answers(value: Any, where: str) -> tuple[str, ...]:
    """Return the distinct gold answers of a column.

    Args:
        value: a text, a number, or a list of them.
        where: names the row in errors.

    Raises:
        DataError: another type, or an answer that no response can match.
    """
    values = value if isinstance(value, list | tuple) else [value]
    if len(values) > MAX_GOLDS:
        raise DataError(f"{where}: {len(values)} gold answers, at most {MAX_GOLDS}")
    texts = (gold_text(v, where) for v in values if v is not None)
    return tuple(dict.fromkeys(_answer_alone(t.strip(), where) for t in texts if t.strip()))


def gold_text(value: Any, where: str) -> str:
    """Return a gold answer as text; numbers are accepted."""
    number = isinstance(value, int | float | Decimal) and not isinstance(value, bool)
    if isinstance(value, str) or (number and math.isfinite(value)):
        return check_text(str(value), f"{where}, answer")
    raise DataError(
        f"{where}: the answer is {shown(value)}; expected a string or a number, or a list of them",
        kind="gold answer of a wrong type",
    )


def _answer_alone(text: str, where: str) -> str:
    """Return the answer part of a text.

    Raises:
        DataError: nothing is left, or it is unclear which part is the answer.
    """
    rest = text.rpartition("</think>")[2]
    found = _in_last_line(_in_tags(rest.strip(), where), where)
    if "<think>" in found and "</think>" not in text:
        raise DataError(f"{where}: the gold answer opens <think> and does not close it; {_TO_DO}")
    if not _NOTHING.sub("", found):
        raise DataError(
            f"{where}: the gold answer {shown(text)} is empty; {_TO_DO}", kind="empty gold answer"
        )
    return found


def _in_tags(text: str, where: str) -> str:
    pieces = _TAG.split(text)
    if len(pieces) == 1:
        return text
    answers = {answer.strip() for answer in pieces[2::4]}
    if pieces[1::2] != ["", "/"] * (len(pieces) // 4) or len(answers) != 1:
        raise DataError(
            f"{where}: {len(pieces) // 2} <answer> and </answer> tags in the gold answer that do "
            f"not enclose one answer; {_TO_DO}",
            kind="<answer> tags that do not enclose one answer",
        )
    return answers.pop()


def _in_last_line(text: str, where: str) -> str:
    last = text.splitlines()[-1] if text else ""
    if "####" in last:
        return last.rpartition("####")[2].strip()
    said = _SAID.search(" ".join(last.split()))
    if said is not None:
        return said[1]
    if "####" in text and "\\boxed" not in text:
        raise DataError(
            f"{where}: #### in the gold answer, but not in its last line; {_TO_DO}",
            kind="#### not in the last line of the gold answer",
        )
    return text
