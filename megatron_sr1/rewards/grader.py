"""The grader: verdicts on sampled answers, whatever a policy writes.

In: an answer, its gold answer, the question. Out: a verdict and the rule that gave it. An answer
never raises: where a library does while it reads or compares one, the verdict is "wrong" and says
what was raised. What raises is a gold answer that cannot be compared even with itself, or a grading
process that does not start; limits of time and memory raise an error of their own.
"""

from __future__ import annotations

from megatron_sr1.errors import ConfigError, GradingError
from megatron_sr1.rewards.accuracy import Verdict, bare_gold, is_runaway, judge_answer
from megatron_sr1.rewards.math_worker import MathWorker, Uncomparable

GRADERS = ("rules", "math_verify")
UNCOMPARABLE = "uncomparable: "
"""Begins the reason of such a verdict; the exception follows."""


class Grader:
    """Judges answers by the rules of accuracy.py, or by math-verify alone."""

    def __init__(self, kind: str, timeout_seconds: float) -> None:
        """Remember the limits; the grading process starts when it is first needed.

        Args:
            kind: rules | math_verify.
            timeout_seconds: one comparison may take so long, > 0.

        Raises:
            ConfigError: unknown kind.
        """
        if kind not in GRADERS:
            raise ConfigError(f"reward.grader is {kind!r}; expected {' | '.join(GRADERS)}")
        self._kind = kind
        self.worker = MathWorker(timeout_seconds, grader=kind)

    def judge(self, answer: str | None, gold: str, question: str, sample_name: str) -> Verdict:
        """Judge an answer.

        Args:
            answer: content of the box; None where there is no box.
            gold: as the dataset has it; may itself be boxed.
            question: as asked, with its options.
            sample_name: for messages.

        Raises:
            GradingLimit: a comparison ran out of time or memory.
            GradingError: there is no gold answer, it cannot be compared with itself, or the grader
                does not start.
        """
        try:
            return self._judge(answer, gold, question, sample_name)
        except GradingError:
            raise
        except Uncomparable as error:
            return Verdict(False, f"{UNCOMPARABLE}{error}")
        except Exception as error:  # of a rule, in this process
            self._check_gold(gold, question, sample_name)
            return Verdict(False, f"{UNCOMPARABLE}{type(error).__name__}: {error}")

    def _judge(self, answer: str | None, gold: str, question: str, sample_name: str) -> Verdict:
        def compare(gold: str, answer: str) -> bool:
            return self.worker.equal(gold, answer, sample_name)

        if self._kind == "rules":
            return judge_answer(answer, gold, question, compare)
        wanted = bare_gold(gold).strip()
        if not wanted:
            raise GradingError(f"the gold answer is {gold!r}; expected some text to compare with")
        if answer is None:
            return Verdict(False, "no box")
        if is_runaway(answer, gold):
            return Verdict(False, "too long")
        return Verdict(compare(wanted, answer), "math_verify")

    def _check_gold(self, gold: str, question: str, sample_name: str) -> None:
        """Raise a GradingError if gold cannot be compared even with itself."""
        try:
            self._judge(bare_gold(gold), gold, question, sample_name)
        except GradingError:
            raise
        except Exception as error:
            raise GradingError(
                f"the gold answer {gold!r} cannot be compared with itself: "
                f"{type(error).__name__}: {error}"
            ) from error

    def close(self) -> None:
        """End the grading process; a later question starts a new one."""
        self.worker.close()
