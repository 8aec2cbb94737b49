"""The grader: a verdict on any text that a policy may sample as an answer.

In: an answer, its gold answer, the question. Out: a verdict and the rule that gave it. An exception
while an answer is read or compared makes it wrong, and the verdict names the exception. Errors are
raised only for a gold answer that cannot be compared with itself, for a grading process that does
not start, and, with a type of their own, for exceeded limits of time and memory.
"""

from __future__ import annotations

from megatron_sr1.errors import ConfigError, GradingError
from megatron_sr1.rewards.accuracy import Verdict, bare_gold, is_runaway, judge_answer
from megatron_sr1.rewards.math_worker import MathWorker, Uncomparable

GRADERS = ("rules", "math_verify")
UNCOMPARABLE = "uncomparable: "
"""Prefix of a verdict's reason if reading or comparing the answer raised; the exception follows."""


class Grader:
    """Judge answers by the rules of accuracy.py, or by math-verify alone."""

    def __init__(self, kind: str, timeout_seconds: float) -> None:
        """Prepare the grading process, which starts when it is first needed.

        Args:
            kind: rules | math_verify.
            timeout_seconds: time limit per comparison, > 0.

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
            answer: content of the box; None without a box.
            gold: as in the dataset; may be boxed.
            question: with its options.
            sample_name: for messages.

        Raises:
            GradingLimit: a comparison exceeded the time or memory limit.
            GradingError: the gold answer is empty or cannot be compared with itself, or the
                grading process does not start.
        """
        try:
            return self._judge(answer, gold, question, sample_name)
        except GradingError:
            raise
        except Uncomparable as error:
            return Verdict(False, f"{UNCOMPARABLE}{error}")
        except Exception as error:  # raised by a rule, in this process
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
        """Raise a GradingError if gold cannot be compared with itself."""
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
        """Stop the grading process; a later comparison starts a new one."""
        self.worker.close()
