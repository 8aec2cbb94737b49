"""The process that compares two mathematical answers: `python -m megatron_sr1.rewards.mathematics`.

In: a line of JSON a question, `{"gold", "answer", "seconds"}`. Out: a line of JSON each,
`{"equal": bool}`, `{"limit": str}` where memory or depth ran out, or `{"error": str}`; first of
all `{"ready": true}`. math-verify does the work, with its LaTeX grammar alone: its grammar of
plain expressions goes through sympy's `parse_expr`, which evaluates text as Python. Both of its
own time limits (signals) are off: worker.py kills this process from outside, and a kernel timer
ends it where nobody is left to do so.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import sys
from typing import Any

MAX_ADDRESS_BYTES = 4 << 30
"""For a single request that process.py, which watches the memory in use, could not see coming."""
LARGEST_EXPONENT = 1000
LARGEST_SYMBOLIC_EXPONENT = 100
"""(x + 1)^500 takes the algebra seconds to multiply out."""
_WARM_UP = (("5", "6"), (r"\sqrt{8}", r"2\sqrt{2}"), ("x>5", "x<5"), ("(1,2)", r"\{1,2\}"))


def parse(text: str) -> list[Any]:
    """Expressions that the LaTeX grammar reads in a text; none if it reads none."""
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig
    from math_verify import parse as parse_latex

    # Units stay: answers.py has taken off what is one, and 5m is not 5.
    as_written = NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none"
    )
    return parse_latex(
        f"${text}$",
        extraction_config=[LatexExtractionConfig(normalization_config=as_written)],
        fallback_mode="no_fallback",
        parsing_timeout=None,
        raise_on_error=True,
    )


def equal(gold: str, answer: str) -> bool:
    r"""Whether an answer equals the gold one as mathematics.

    An answer is wrong that the grammar cannot read, that has no value (division by zero), or that
    leaves the work undone: a sum, an integral, a limit, a power or factorial beyond all bounds.
    Such text was not refused by a broken grader; it is no answer.

    Args:
        gold: LaTeX or plain mathematics, without delimiters.
        answer: the same.
    """
    from math_verify import verify

    golds, answers = parse(gold), parse(answer)
    if not golds or not answers or any(_is_undone(a) for a in answers):
        return False
    if any(_has_no_value(e) for e in (*golds, *answers)):
        return False
    return bool(verify(golds, answers, timeout_seconds=None, raise_on_error=True))


def _has_no_value(expression: Any) -> bool:
    from sympy import nan, zoo

    return bool(getattr(expression, "has", lambda *_: False)(nan, zoo))


def _is_undone(expression: Any) -> bool:
    from sympy import Derivative, Integral, Limit, Pow, Product, Sum, factorial, preorder_traversal

    for part in preorder_traversal(expression):
        if isinstance(part, Sum | Integral | Limit | Product | Derivative):
            return True
        size, largest = None, LARGEST_EXPONENT
        if isinstance(part, Pow):
            base, size = part.args
            largest = LARGEST_SYMBOLIC_EXPONENT if base.free_symbols else LARGEST_EXPONENT
        elif isinstance(part, factorial):
            size = part.args[0]
        if size is None or size.free_symbols:
            continue
        if size.has(Pow, factorial) and not _is_root(size):
            return True
        if size.is_number and size.is_Rational and abs(size) > largest:
            return True
    return False


def _is_root(size: Any) -> bool:
    """An exponent like 1/2 that the grammar keeps as 2 to the -1."""
    return bool(size.is_Pow and size.args[0].is_Integer and size.args[1] == -1)


def serve(replies: Any) -> None:
    """Answer questions from standard input until it ends."""
    for line in sys.stdin:
        asked = json.loads(line)
        # The default action ends the process, also inside a C loop that sees no Python signal.
        signal.setitimer(signal.ITIMER_REAL, 2 * asked["seconds"] + 1)
        try:
            reply: dict[str, Any] = {"equal": equal(asked["gold"], asked["answer"])}
        except (MemoryError, RecursionError) as error:
            reply = {"limit": type(error).__name__}
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"}
        signal.setitimer(signal.ITIMER_REAL, 0)
        replies.write(json.dumps(reply) + "\n")


def main() -> None:
    """Keep standard output for replies, load the library, warm it up, serve."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not look like a reply
    logging.disable(logging.CRITICAL)
    resource.setrlimit(resource.RLIMIT_AS, (MAX_ADDRESS_BYTES, MAX_ADDRESS_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for gold, answer in _WARM_UP:
        equal(gold, answer)
    replies.write(json.dumps({"ready": True}) + "\n")
    serve(replies)


if __name__ == "__main__":
    main()
