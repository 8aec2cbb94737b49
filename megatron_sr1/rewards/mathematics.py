"""The process that compares mathematical answers, by math-verify 0.9.

`python -m megatron_sr1.rewards.mathematics rules | math_verify` writes `{"ready": true}`, then
answers each line of JSON, `{"gold", "answer", "seconds"}`, with one: `{"equal": bool}`,
`{"uncomparable": str}` if reading or comparing the answer raised, `{"limit": str}` if memory ran
out, or `{"error": str}` if gold cannot be compared with itself.

With `math_verify` the library is called as in its README: it reads LaTeX, then plain expressions,
which sympy's `parse_expr` evaluates as Python, but whose pattern admits only digits and operators.
With `rules` it reads LaTeX alone, and `install` replaces three functions that are called from deep
inside its comparison of sets, tuples, intervals, equations and matrices, and that err:

- numbers: the library evaluates a difference to 15 digits and rounds it to 0, so that 2^-99 equals
  2^-98. Here closeness is relative, and numbers without decimals are compared exactly;
- chains of relations: the library pairs them in order and raises if their lengths differ. Here
  1 < x < 3 and 3 > x > 1 are equal, and chains of different lengths are not;
- "not equal" is missing in the library's table of mirrored relations, which raises KeyError.

The library's own time limits (signals) are off: math_worker.py kills this process from outside, and
a kernel timer ends it if that process is gone.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import sys
from collections.abc import Callable
from functools import lru_cache
from itertools import product
from typing import Any

import math_verify
import sympy
from latex2sympy2_extended import NormalizationConfig
from latex2sympy2_extended.logic import And
from math_verify import ExprExtractionConfig, LatexExtractionConfig
from math_verify.grader import get_pct_val, safe_sympy_doit

from megatron_sr1.rewards.answers import DECIMAL_CLOSENESS, all_paired

MAX_ADDRESS_BYTES = 4 << 30
"""For a single allocation, too fast for math_worker.py, which watches the memory in use."""
LARGEST_EXPONENT = 1000
LARGEST_SYMBOLIC_EXPONENT = 100
"""Expanding (x + 1)^500 takes seconds."""
MAX_REASON_CHARACTERS = 200
UNDONE = (sympy.Sum, sympy.Integral, sympy.Limit, sympy.Product, sympy.Derivative)
_WARM_UP = (("5", "6"), (r"\sqrt{8}", r"2\sqrt{2}"), ("x>5", "x<5"), ("(1,2)", r"\{1,2\}"))
SAME_NUMBER = 1e-50
"""Relative tolerance between numbers whose exact difference sympy cannot compute."""


def parse(text: str) -> list[Any]:
    """Return the expressions that the LaTeX grammar reads in a text, possibly none."""
    # Keep what looks like units: answers.py has removed the real ones, and 5m is not 5.
    as_written = NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none"
    )
    return math_verify.parse(
        f"${text}$",
        extraction_config=[LatexExtractionConfig(normalization_config=as_written)],
        fallback_mode="no_fallback",
        parsing_timeout=None,
        raise_on_error=True,
    )


def equal(golds: list[Any], answer: str) -> bool:
    r"""Return True if an answer, without math delimiters, equals one of the gold expressions.

    An answer is wrong if the grammar cannot read it, if it has no value (division by zero), or if
    it leaves the work undone: a sum, an integral, a limit, a huge power or factorial.
    """
    answers = parse(answer)
    if not golds or any(map(_is_undone, answers)) or any(map(_has_no_value, answers)):
        return False
    return _verify(golds, answers)


def _library_parse(text: str) -> list[Any]:
    """Return the expressions that math-verify reads in a text, called as in its README."""
    return math_verify.parse(
        text,
        extraction_config=[LatexExtractionConfig(), ExprExtractionConfig()],
        parsing_timeout=None,
        raise_on_error=True,
    )


def _verify(golds: list[Any], answers: list[Any]) -> bool:
    """Return True if any pair is equal; raise if none is and comparing one raised.

    The library stops at the first pair that raises, even if another is equal.
    """
    raised: Exception | None = None
    for gold, answer in product(golds, answers):
        try:
            if math_verify.verify(gold, answer, timeout_seconds=None, raise_on_error=True):
                return True
        except MemoryError:
            raise
        except Exception as error:
            raised = error
    if raised is not None:
        raise raised
    return False


GRADERS: dict[str, tuple[Callable[[str], list[Any]], Callable[[list[Any], str], bool]]] = {
    "rules": (parse, equal),
    "math_verify": (
        lambda gold: _library_parse(gold if "$" in gold else f"${gold}$"),
        lambda golds, answer: _verify(golds, _library_parse(rf"\boxed{{{answer}}}")),
    ),
}
"""Functions that read a gold answer, and that compare an answer with it."""


@lru_cache(maxsize=1024)  # the responses of a group share their gold answer
def read_gold(gold: str, grader: str) -> list[Any]:
    """Parse a gold answer; none for 1/0, which nothing equals.

    It is compared with itself, so that it raises here if it ever does.
    """
    golds = GRADERS[grader][0](gold)
    if any(map(_has_no_value, golds)):
        return []
    _verify(golds, golds)
    return golds


def _has_no_value(expression: Any) -> bool:
    return bool(getattr(expression, "has", lambda *_: False)(sympy.nan, sympy.zoo))


def _is_undone(expression: Any) -> bool:
    for part in sympy.preorder_traversal(expression):
        if isinstance(part, UNDONE):
            return True
        if not isinstance(part, sympy.Pow | sympy.factorial) or part.args[-1].free_symbols:
            continue
        size = part.args[-1]
        is_symbolic = isinstance(part, sympy.Pow) and part.args[0].free_symbols
        largest = LARGEST_SYMBOLIC_EXPONENT if is_symbolic else LARGEST_EXPONENT
        # The grammar keeps an exponent of 1/2 as 2^-1.
        is_root = size.is_Pow and size.args[0].is_Integer and size.args[1] == -1
        if size.has(sympy.Pow, sympy.factorial) and not is_root:
            return True
        if size.is_number and size.is_Rational and abs(size) > largest:
            return True
    return False


def install() -> None:
    """Replace the three functions in the library; call it once per process."""
    grader = math_verify.grader
    grader.INVERSE_RELATIONS[sympy.Ne] = sympy.Ne
    grader.sympy_numeric_eq = equal_numbers
    one_relation = grader.sympy_compare_relational

    def equal_relations(gold: Any, answer: Any, *rounding: int) -> bool:
        """Return True if both have the same relations, in any order."""
        return all_paired(
            _relations(gold), _relations(answer), lambda *pair: one_relation(*pair, *rounding)
        )

    grader.sympy_compare_relational = equal_relations


def equal_numbers(gold: Any, answer: Any, float_rounding: int, numeric_precision: int) -> bool:
    """Return True if two numbers, or two matrices of them, are equal.

    The library passes the last two arguments, which are not used.
    """
    gold, answer = safe_sympy_doit(gold), safe_sympy_doit(answer)
    if isinstance(gold, sympy.MatrixBase) or isinstance(answer, sympy.MatrixBase):
        if getattr(gold, "shape", None) != getattr(answer, "shape", None):
            return False
        pairs = zip(gold.flat(), answer.flat(), strict=True)
        return all(equal_numbers(one, other, 0, 0) for one, other in pairs)
    if not isinstance(gold, sympy.Expr) or not isinstance(answer, sympy.Expr):
        return False  # a relation and a number
    plain = [get_pct_val(side, side) for side in (gold, answer)]  # without percent signs
    if any(isinstance(side, sympy.Integer) for side in plain):
        gold, answer = plain
    decimals = [isinstance(side, sympy.Float) for side in plain]
    exact = answer if decimals[0] else gold
    is_rounded = sum(decimals) == 1 and not isinstance(exact, sympy.Integer)
    gold, answer = _exact(gold), _exact(answer)
    difference = gold - answer
    if difference == 0:
        return True
    if not difference.is_number or difference.is_finite is False:
        return False
    if difference.is_Rational and not is_rounded:
        return False
    tolerance = float(DECIMAL_CLOSENESS) if is_rounded else SAME_NUMBER
    return bool(abs(difference.evalf()) <= tolerance * abs(gold.evalf()))


def _exact(expression: Any) -> Any:
    """Convert decimals to exact fractions."""
    floats = expression.atoms(sympy.Float)
    return expression.xreplace({number: sympy.Rational(str(number)) for number in floats})


def _relations(expression: Any) -> list[Any]:
    """Return the relations of a chain, or a single one as a list."""
    if not isinstance(expression, And):
        return [expression]
    return [part for argument in expression._unsorted_args for part in _relations(argument)]


def serve(replies: Any, grader: str = "rules") -> None:
    """Answer requests from standard input until it ends."""
    for line in sys.stdin:
        request = json.loads(line)
        # The default action ends the process even in C code, where Python handles no signals.
        signal.setitimer(signal.ITIMER_REAL, 2 * request["seconds"] + 1)
        blamed = "error"
        try:
            golds = read_gold(request["gold"], grader)
            blamed = "uncomparable"
            reply: dict[str, Any] = {"equal": GRADERS[grader][1](golds, request["answer"])}
        except MemoryError as error:
            reply = {"limit": type(error).__name__}
        except Exception as error:
            reply = {blamed: f"{type(error).__name__}: {error}"[:MAX_REASON_CHARACTERS]}
        signal.setitimer(signal.ITIMER_REAL, 0)
        replies.write(json.dumps(reply) + "\n")


def main(grader: str) -> None:
    """Reserve standard output for replies and warm the library up, then serve."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # so that output of libraries is not taken for a reply
    logging.disable(logging.CRITICAL)
    resource.setrlimit(resource.RLIMIT_AS, (MAX_ADDRESS_BYTES, MAX_ADDRESS_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if grader == "rules":
        install()
    for gold, answer in _WARM_UP:
        GRADERS[grader][1](read_gold(gold, grader), answer)
    replies.write(json.dumps({"ready": True}) + "\n")
    serve(replies, grader)


if __name__ == "__main__":
    main(*sys.argv[1:])
