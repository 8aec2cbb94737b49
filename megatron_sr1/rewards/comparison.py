"""Comparisons in which math-verify 0.9 errs, replaced in this process.

In: two expressions of sympy. Out: whether they are equal. Three parts of `math_verify.grader` are
replaced by `install`, because they are called from deep inside its comparison of sets, tuples,
intervals, equations and matrices, where a check before or after it cannot reach:

- numbers: the library evaluates a difference to 15 digits and takes what is small for 0, so 2^-99
  would equal 2^-98. Here closeness is relative, and numbers without decimals are exact;
- chains of relations: the library pairs them in order and raises where lengths differ. Here
  1 < x < 3 and 3 > x > 1 are the same relations, and chains of different lengths differ;
- "not equal": the library's table of mirrored relations does not have it, and raises KeyError.
"""

from __future__ import annotations

from typing import Any

DECIMAL_CLOSENESS = 2e-6
"""A plain decimal equals an exact number that is so close to it, relatively: 0.333333 and 1/3. The
same as in answers.py."""
SAME_NUMBER = 1e-50
"""Relative difference below which two numbers that sympy cannot tell apart exactly are the same."""


def install() -> None:
    """Replace the three parts in the library, once a process."""
    from math_verify import grader
    from sympy import Ne

    grader.INVERSE_RELATIONS[Ne] = Ne
    grader.sympy_numeric_eq = equal_numbers
    one_relation = grader.sympy_compare_relational

    def equal_relations(gold: Any, answer: Any, *rounding: int) -> bool:
        """Return True if both hold the same relations, in any order."""
        golds, left = _relations(gold), _relations(answer)
        if len(golds) != len(left):
            return False
        for relation in golds:
            same = (n for n, other in enumerate(left) if one_relation(relation, other, *rounding))
            found = next(same, None)
            if found is None:
                return False
            del left[found]
        return True

    grader.sympy_compare_relational = equal_relations


def equal_numbers(gold: Any, answer: Any, float_rounding: int, numeric_precision: int) -> bool:
    """Return True if two numbers, or two matrices of them, are equal.

    Args:
        gold: expression.
        answer: expression.
        float_rounding: the library's; not used.
        numeric_precision: the library's; not used.
    """
    from math_verify.grader import get_pct_val, safe_sympy_doit
    from sympy import Expr, Float, Integer, MatrixBase

    gold, answer = safe_sympy_doit(gold), safe_sympy_doit(answer)
    if isinstance(gold, MatrixBase) or isinstance(answer, MatrixBase):
        if getattr(gold, "shape", None) != getattr(answer, "shape", None):
            return False
        pairs = zip(gold.flat(), answer.flat(), strict=True)
        return all(equal_numbers(one, other, 0, 0) for one, other in pairs)
    if not isinstance(gold, Expr) or not isinstance(answer, Expr):
        return False  # a relation beside a number
    if any(isinstance(get_pct_val(side, side), Integer) for side in (gold, answer)):
        gold, answer = get_pct_val(gold, gold), get_pct_val(answer, answer)
    decimals = [isinstance(get_pct_val(side, side), Float) for side in (gold, answer)]
    is_rounded = sum(decimals) == 1 and not isinstance(answer if decimals[0] else gold, Integer)
    gold, answer = _exact(gold), _exact(answer)
    difference = gold - answer
    if difference == 0:
        return True
    if not difference.is_number or difference.is_finite is False:
        return False
    if difference.is_Rational and not is_rounded:
        return False
    tolerance = DECIMAL_CLOSENESS if is_rounded else SAME_NUMBER
    return bool(abs(difference.evalf()) <= tolerance * abs(gold.evalf()))


def _exact(expression: Any) -> Any:
    """Read decimals as the fractions that they are."""
    from sympy import Float, Rational

    floats = expression.atoms(Float)
    return expression.xreplace({number: Rational(str(number)) for number in floats})


def _relations(expression: Any) -> list[Any]:
    """Return the relations of a chain, or the one that there is."""
    from latex2sympy2_extended.logic import And

    if not isinstance(expression, And):
        return [expression]
    return [part for argument in expression._unsorted_args for part in _relations(argument)]
