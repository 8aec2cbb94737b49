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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, NamedTuple

from megatron_sr1.config.rollout import RewardConfig
from megatron_sr1.errors import GradingLimit
from megatron_sr1.records import RIGHT_FROM, Example, Reward, Rollout
from megatron_sr1.rewards.answered import (
    Answered,
    Finished,
    Read,
    answered,
    check_readings,
    texts_of,
)
from megatron_sr1.rewards.grader import UNCOMPARABLE, Grader
from megatron_sr1.rewards.leakage import states_answer
from megatron_sr1.rewards.response import Marks, find_answer, has_format, marks_of
from megatron_sr1.rewards.user_reward import Call, UserReward


class _Judged(NamedTuple):
    """The value of a text, the rule that decided, all exceptions, and a function's metrics.

    The rule is the one for the last gold answer compared.
    """

    value: float
    because: str
    exceptions: Sequence[str] = ()
    metrics: Mapping[str, float] = {}


class Scorer(AbstractContextManager["Scorer"]):
    """Compute the rewards of one recipe; a context manager that stops the grading process.

    Attributes:
        function: the user's function, if there is one.
    """

    def __init__(
        self,
        config: RewardConfig,
        max_response_tokens: int = 0,
        on_call: Callable[[str], None] = lambda name: None,
    ) -> None:
        """Load the user's function, if any; the grading process starts when first needed.

        `max_response_tokens` is where the penalty of `reward.overlong` ends; `on_call` is passed
        the name of a sample before the function is called about it.

        Raises:
            ConfigError: the user's function cannot be loaded.
        """
        self._config, self._recipe = config, config.recipe
        self._marks = marks_of(config.spans)
        self._longest_tokens = max_response_tokens
        self.function = UserReward(config.function, config, on_call) if config.function else None
        is_total = config.function_for == "total"
        self._total = self.function if is_total else None
        self._accuracy = None if is_total else self.function
        self._grader = Grader(config.grader, config.grader_timeout_seconds)

    def score(self, sample_name: str, rollout: Rollout, example: Example) -> Reward:
        """Return the rewards of a rollout of an example; messages name the sample.

        Raises:
            GradingLimit: the rollout cannot be graded.
            GradingError: as `score_all`.
        """
        (found,) = self.results([Finished(sample_name, rollout, example)])
        if isinstance(found, GradingLimit):
            raise found
        return found

    def results(self, finished: Sequence[Finished]) -> list[Reward | GradingLimit]:
        """Return the rewards of rollouts, in order, graded in this process."""
        groups: dict[int, list[Finished]] = {}
        for each in finished:
            groups.setdefault(each.rollout.index, []).append(each)
        ordered = [each for group in groups.values() for each in group]
        found = self.score_all([answered(each) for each in ordered])
        by_key = {each.key: reward for each, reward in zip(ordered, found, strict=True)}
        return [by_key[each.key] for each in finished]

    def score_all(
        self, given: Sequence[Answered], by_prompt: bool = False
    ) -> list[Reward | GradingLimit]:
        """Return the rewards of rollouts; those of a prompt follow one another.

        total = accuracy_weight x accuracy + format_weight x format
                + self_reward_weight x self_reward (vision_sr1 with images; 0 for an unpaid leak)
        or what the user's function for the total returned; - overlong.weight x overlong.

        An answer that equals any of the gold answers is right, and a description that states any
        of them is a leak. A GradingLimit takes the place of a reward if a comparison exceeded the
        time or memory limit, or an endpoint did not give a reading; with `by_prompt` also of the
        rewards of the prompt's later rollouts.

        Raises:
            GradingError: the gold answer is empty or cannot be compared, the grading process does
                not start, or the user's function failed.
        """
        judged = self._by_function(given) if self._accuracy else self._by_grader(given, by_prompt)
        found = [
            verdicts if isinstance(verdicts, GradingLimit) else self._reward(each, verdicts)
            for each, verdicts in zip(given, judged, strict=True)
        ]
        return self._with_totals(given, found) if self._total else found

    def _by_grader(
        self, given: Sequence[Answered], by_prompt: bool
    ) -> list[list[_Judged] | GradingLimit]:
        """Return the grader's verdicts on responses and what was read from them."""
        found: list[list[_Judged] | GradingLimit] = []
        limits: dict[int, GradingLimit] = {}
        for each in given:
            if by_prompt and each.index in limits:
                found.append(limits[each.index])
                continue
            try:
                check_readings(each)
                found.append([self._grade(each, text) for text, _ in texts_of(each)])
            except GradingLimit as error:
                limits[each.index] = error
                found.append(error)
        return found

    def _grade(self, given: Answered, text: str) -> _Judged:
        because, exceptions = "", list[str]()
        for gold in given.golds or ("",):  # the grader rejects an empty one
            answer = find_answer(text, self._marks)
            verdict = self._grader.judge(answer, gold, given.question, given.name)
            because = verdict.because
            if because.startswith(UNCOMPARABLE):
                exceptions.append(because.removeprefix(UNCOMPARABLE))
            if verdict.right:
                return _Judged(1.0, because, exceptions)
        return _Judged(0.0, because, exceptions)

    def _by_function(self, given: Sequence[Answered]) -> list[list[_Judged] | GradingLimit]:
        """Return the user's verdicts: first on the responses to each prompt, then on readings."""
        assert self._accuracy is not None
        found: list[list[_Judged] | GradingLimit] = []
        calls: dict[tuple[int, bool], list[tuple[list[_Judged], Call]]] = {}
        for each in given:
            verdicts: list[_Judged] = []
            try:
                check_readings(each)
            except GradingLimit as error:
                found.append(error)
                continue
            found.append(verdicts)
            for number, (text, num_tokens) in enumerate(texts_of(each)):
                call = _call(each, response=text, num_tokens=num_tokens)
                calls.setdefault((each.index, number > 0), []).append((verdicts, call))
        scores = self._accuracy.judge([[call for _, call in group] for group in calls.values()])
        for group, of_group in zip(calls.values(), scores, strict=True):
            for (verdicts, _), score in zip(group, of_group, strict=True):
                verdicts.append(_Judged(score.value, "function", (), score.metrics))
        return found

    def _with_totals(
        self, given: Sequence[Answered], found: Sequence[Reward | GradingLimit]
    ) -> list[Reward | GradingLimit]:
        """Replace the totals, less the penalty for length, by those of the user's function."""
        assert self._total is not None
        calls: dict[int, list[tuple[int, Call]]] = {}
        for number, (each, reward) in enumerate(zip(given, found, strict=True)):
            if isinstance(reward, Reward):
                names = ("accuracy", "format", "self_reward", "leak", "total")
                verdicts = {name: getattr(reward, name) for name in names}
                read = None if each.reading is None else "\n".join(each.reading.texts)
                verdicts["total"] += self._penalty(reward.overlong)
                call = _call(each, num_tokens=each.num_tokens, reading=read, **verdicts)
                calls.setdefault(each.index, []).append((number, call))
        scores = self._total.judge([[call for _, call in group] for group in calls.values()])
        replaced = list(found)
        for group, of_group in zip(calls.values(), scores, strict=True):
            for (number, _), score in zip(group, of_group, strict=True):
                reward = found[number]
                assert isinstance(reward, Reward)
                total = score.value - self._penalty(reward.overlong)
                replaced[number] = replace(reward, total=total, metrics=score.metrics)
        return replaced

    def _reward(self, given: Answered, judged: Sequence[_Judged]) -> Reward:
        """Return the rewards that follow from the verdicts on the texts of a rollout."""
        exceptions = [text for each in judged for text in each.exceptions]
        accuracy, values = judged[0].value, iter([each.value for each in judged[1:]])
        self_reward = self._self_reward(given, values)
        leak = _leaks(given, self._marks, exceptions)
        has_right_format = has_format(given.response, self._recipe, self._marks)
        is_paid = self._recipe == "vision_sr1" and (self._config.pay_leaks or not leak)
        paid = (self_reward or 0.0) if is_paid else 0.0
        overlong = self._overlong(given.num_tokens)
        texts = given.reading.texts if given.reading and given.description else ()
        return Reward(
            accuracy=accuracy,
            format=float(has_right_format),
            self_reward=self_reward,
            leak=leak,
            total=self._config.accuracy_weight * accuracy
            + self._config.format_weight * has_right_format
            + self._config.self_reward_weight * paid
            - self._penalty(overlong),
            answer=find_answer(given.response, self._marks),
            reading_answer=find_answer(texts[0], self._marks) if texts else None,
            uncomparable=next(iter(exceptions), None),
            because=judged[0].because,
            reading_because=judged[1].because if len(judged) > 1 else None,
            overlong=overlong,
            metrics=judged[0].metrics,
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

    def _self_reward(self, given: Answered, values: Iterator[float]) -> float | None:
        """Return the reward of pass 2; None without pass 2.

        With a reading of the question alone it is max(value of the reading - value of that, 0).
        Without the maximum, the baseline, which is the same for the whole group, would cancel out
        in the advantages.
        """
        if not given.num_images:
            return None
        if given.description is None:
            return 0.0 if self._recipe == "vision_sr1" else None
        if given.reading is None:
            return None
        value = self._value(given.reading, values)
        if given.question_only is not None:
            value = max(value - self._value(given.question_only, values), 0.0)
        return value

    def _value(self, reading: Read, values: Iterator[float]) -> float:
        """Return the mean value of the answers, or the reward of the likelihood, in [0, 1].

        The likelihood p is that of the gold answer's tokens: per_token: its mean over them |
        probability: p | linear: 1 + log p / likelihood_nats, at least 0.
        """
        logprobs, kind = reading.gold_logprobs, self._config.likelihood
        if logprobs is None:
            return sum(next(values) for _ in reading.texts) / len(reading.texts)
        if kind == "linear":
            return max(1.0 + sum(logprobs) / self._config.likelihood_nats, 0.0)
        return math.exp(sum(logprobs) / (len(logprobs) if kind == "per_token" else 1))

    def _overlong(self, num_tokens: int | None) -> float | None:
        """Return the penalty for length, from 0 to 1; None if there is none.

        0 up to max_response_tokens - cache_tokens, from there to max_response_tokens in proportion
        (DAPO, arXiv 2503.14476, equation 13, which is its negative).
        """
        cache = self._config.overlong.cache_tokens
        if not cache:
            return None
        excess = (num_tokens or 0) - (self._longest_tokens - cache)
        return min(max(excess / cache, 0.0), 1.0)

    def _penalty(self, overlong: float | None) -> float:
        return self._config.overlong.weight * (overlong or 0.0)

    def __exit__(self, *_: object) -> None:
        """Stop the grading process; a later score starts a new one."""
        self._grader.worker.close()
        if self.function is not None:
            self.function.close()


def _call(given: Answered, **arguments: Any) -> Call:
    """Return a call of the user's function about a rollout."""
    own: dict[str, Any] = {"response": given.response, "description": given.description}
    own |= {"question": given.question, "metadata": given.metadata}
    return Call(given.name, given.golds, own | arguments, given.image_paths)


def _leaks(given: Answered, marks: Marks, exceptions: list[str]) -> bool:
    """Return True if a description states a gold answer, or if reading it raised."""
    described, question = given.description, given.question
    if described is None:
        return False
    try:
        return any(states_answer(described, gold, question, marks) for gold in given.golds)
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
