"""The rewards of a rollout, their weighted sum, and the rates of verdicts in an evaluation.

Source: Vision-SR1 (arXiv 2508.19652 v1, section 3.2): accuracy, format and self-reward, weighted
and added; the language-shortcut rate is the share of responses that are right with the image and
wrong from their description alone. Unlike in its code, a response without a description has neither
a second pass nor a self-reward, a description that states the answer is flagged, and a failing
grader raises. Answers are judged by the grader (grader.py) or by the user's function
(user_reward.py). An exception in that function stops the run; sampled text never does.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from megatron_sr1.config.rollout import RewardConfig
from megatron_sr1.errors import GradingLimit
from megatron_sr1.records import RIGHT_FROM, Example, Reading, Reward, Rollout
from megatron_sr1.rewards.grader import UNCOMPARABLE, Grader
from megatron_sr1.rewards.leakage import states_answer
from megatron_sr1.rewards.response import Marks, find_answer, has_format, marks_of
from megatron_sr1.rewards.user_reward import UserReward


@dataclass
class _Notes:
    """What is noted while a rollout is judged: the reason of each verdict, and all exceptions."""

    reasons: list[str] = field(default_factory=list)
    exceptions: list[str] = field(default_factory=list)


class Scorer(AbstractContextManager["Scorer"]):
    """Compute the rewards of one recipe; a context manager that stops the grading process."""

    def __init__(self, config: RewardConfig) -> None:
        """Load the user's function, if any; the grading process starts when first needed.

        Raises:
            ConfigError: the user's function cannot be loaded.
        """
        self._config, self._recipe = config, config.recipe
        self._marks = marks_of(config.spans)
        self._user_reward = UserReward(config.function) if config.function else None
        self._grader = Grader(config.grader, config.grader_timeout_seconds)

    def score(self, sample_name: str, rollout: Rollout, example: Example) -> Reward:
        """Return the rewards of a rollout of an example; messages name the sample.

        total = accuracy_weight x accuracy + format_weight x format
                + self_reward_weight x self_reward (vision_sr1 with images; 0 for an unpaid leak)

        An answer that equals any of the gold answers is right, and a description that states any
        of them is a leak.

        Raises:
            GradingLimit: a comparison exceeded the time or memory limit, or an endpoint did not
                give a reading.
            GradingError: the gold answer is empty or cannot be compared, the grading process does
                not start, or the user's function failed.
        """
        for reading in (rollout.reading, rollout.question_only):
            if reading is not None and reading.failure is not None:
                raise GradingLimit(f"{sample_name}: pass 2 at rollout.endpoint: {reading.failure}")
        notes = _Notes()
        judge = partial(self._judge, sample_name, rollout, example, notes)
        accuracy = judge(rollout.completion.text)
        self_reward = self._self_reward(rollout, example, judge)
        leak = _leaks(rollout.description, example, self._marks, notes.exceptions)
        has_right_format = has_format(rollout.completion.text, self._recipe, self._marks)
        is_paid = self._recipe == "vision_sr1" and (self._config.pay_leaks or not leak)
        paid = (self_reward or 0.0) if is_paid else 0.0
        texts = rollout.reading.texts if rollout.reading and rollout.description else ()
        return Reward(
            accuracy=accuracy,
            format=float(has_right_format),
            self_reward=self_reward,
            leak=leak,
            total=self._config.accuracy_weight * accuracy
            + self._config.format_weight * has_right_format
            + self._config.self_reward_weight * paid,
            answer=find_answer(rollout.completion.text, self._marks),
            reading_answer=find_answer(texts[0], self._marks) if texts else None,
            uncomparable=next(iter(notes.exceptions), None),
            because=notes.reasons[0],
            reading_because=next(iter(notes.reasons[1:]), None),
        )

    def ungraded(self, rollout: Rollout, example: Example) -> Reward:
        """Return zero rewards for a rollout that could not be graded."""
        return Reward(
            accuracy=0.0,
            format=0.0,
            self_reward=0.0 if example.num_images and self._recipe == "vision_sr1" else None,
            leak=False,
            total=0.0,
            answer=find_answer(rollout.completion.text, self._marks),
            reading_answer=None,
        )

    def _judge(
        self, sample_name: str, rollout: Rollout, example: Example, notes: _Notes, text: str
    ) -> float:
        """Return the best value that a gold answer gives a text, 0 or 1 without a user's function.

        The rule that decided on the last gold answer compared is noted, and all exceptions.
        """
        best, because = 0.0, "function"
        for gold in example.golds or ("",):  # the grader rejects an empty one
            if self._user_reward is None:
                answer = find_answer(text, self._marks)
                verdict = self._grader.judge(answer, gold, example.question, sample_name)
                because = verdict.because
                if because.startswith(UNCOMPARABLE):
                    notes.exceptions.append(because.removeprefix(UNCOMPARABLE))
                value = float(verdict.right)
            else:
                value = self._user_reward(
                    sample_name,
                    response=text,
                    gold=gold,
                    question=example.question,
                    description=rollout.description,
                    metadata=dict(example.metadata),
                )
            best = max(best, value)
            if best == 1:
                break
        notes.reasons.append(because)
        return best

    def _self_reward(
        self, rollout: Rollout, example: Example, judge: Callable[[str], float]
    ) -> float | None:
        """Return the reward of pass 2, in [0, 1]; None without pass 2.

        With a reading of the question alone it is max(value of the reading - value of that, 0).
        Without the maximum, the baseline, which is the same for the whole group, would cancel out
        in the advantages.
        """
        if not example.num_images:
            return None
        if rollout.description is None:
            return 0.0 if self._recipe == "vision_sr1" else None
        if rollout.reading is None:
            return None
        value = self._value(rollout.reading, judge)
        if rollout.question_only is not None:
            value = max(value - self._value(rollout.question_only, judge), 0.0)
        return value

    def _value(self, reading: Reading, judge: Callable[[str], float]) -> float:
        """Return the mean reward of the answers, or the reward of the likelihood, in [0, 1].

        The likelihood p is that of the gold answer's tokens: per_token: its mean over them |
        probability: p | linear: 1 + log p / likelihood_nats, at least 0.
        """
        logprobs, kind = reading.gold_logprobs, self._config.likelihood
        if logprobs is None:
            return sum(judge(text) for text in reading.texts) / len(reading.texts)
        if kind == "linear":
            return max(1.0 + sum(logprobs) / self._config.likelihood_nats, 0.0)
        return math.exp(sum(logprobs) / (len(logprobs) if kind == "per_token" else 1))

    def __exit__(self, *_: object) -> None:
        """Stop the grading process; a later score starts a new one."""
        self._grader.worker.close()


def _leaks(description: str | None, example: Example, marks: Marks, exceptions: list[str]) -> bool:
    """Return True if a description states a gold answer, or if reading it raised."""
    if description is None:
        return False
    try:
        question = example.question
        return any(states_answer(description, gold, question, marks) for gold in example.golds)
    except Exception as error:
        exceptions.append(f"{type(error).__name__}: {error}")
        return True


VERDICTS = {
    "accuracy": ("accuracy", "answer right"),
    "self_reward": ("self_reward", "self-reward"),
    "description_exact": ("description_exact", "description exact"),
    "shortcut": ("shortcut_rate", "shortcut"),
}
"""Verdict of an evaluation line -> name of its rate in summary.json, label in reports."""


def rate(lines: Sequence[dict[str, Any]], verdict: str) -> float | None:
    """Return the mean of a verdict over the lines that have it; None if none has."""
    values = [line[verdict] for line in lines if line.get(verdict) is not None]
    return sum(values) / len(values) if values else None


def rates(lines: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return the rates of the verdicts that any of the lines has."""
    found = {name: rate(lines, verdict) for verdict, (name, _) in VERDICTS.items()}
    return {name: value for name, value in found.items() if value is not None}


def cross(verdicts: Iterable[tuple[float, float | None]]) -> Counter[tuple[bool, bool]]:
    """Count responses by (answer right, reading right).

    `verdicts` holds accuracy and self-reward of each. A response without a self-reward is skipped;
    a value between 0 and 1 counts as right from 0.5 on.
    """
    return Counter(
        (accuracy >= RIGHT_FROM, self_reward >= RIGHT_FROM)
        for accuracy, self_reward in verdicts
        if self_reward is not None
    )


def is_exact(description: str, expected: Sequence[Any]) -> bool:
    """Return True if a description names the expected words or digits in order, and no others.

    If all that is expected are digits, the other text is not compared.
    """
    items = [str(item).lower() for item in expected]
    pattern = "[0-9]" if all(re.fullmatch("[0-9]", item) for item in items) else r"\w+"
    return re.findall(pattern, description.lower()) == items
