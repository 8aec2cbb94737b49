"""The rewards of a rollout and their weighted sum.

In: a response, its gold answer, its description, and the answers given from that in pass 2. Out: a
`Reward`. Source: Vision-SR1 (arXiv 2508.19652 v1, section 3.2): accuracy, format and self-reward,
weighted and added. Unlike in its code, a response without a description has neither a second pass
nor a self-reward, a description that states the answer is flagged, and a failing grader raises.
Answers are judged by the grader (grader.py) or by the user's function (user_reward.py). An
exception in that function stops the run; sampled text never does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

from megatron_sr1.config.rollout import RewardConfig
from megatron_sr1.errors import ConfigError, GradingError
from megatron_sr1.records import Reading, Reward
from megatron_sr1.rewards.grader import UNCOMPARABLE, Grader
from megatron_sr1.rewards.leakage import states_answer
from megatron_sr1.rewards.response import BLOCKS, find_answer, has_format
from megatron_sr1.rewards.user_reward import UserReward


class Scorer:
    """Compute the rewards of one recipe; a context manager that stops the grading process."""

    def __init__(self, config: RewardConfig) -> None:
        """Load the user's function, if any; the grading process starts when first needed.

        Raises:
            ConfigError: unknown recipe or grader, or the user's function cannot be loaded.
        """
        if config.recipe not in BLOCKS:
            raise ConfigError(f"reward.recipe is {config.recipe!r}; expected {' | '.join(BLOCKS)}")
        self._config, self._recipe = config, config.recipe
        self._user_reward = UserReward(config.function) if config.function else None
        self._grader = Grader(config.grader, config.grader_timeout_seconds)

    def score(
        self,
        sample_name: str,
        response_text: str,
        gold: str,
        question: str,
        description: str | None,
        reading: Reading | None,
        has_image: bool,
        question_only: Reading | None = None,
        metadata: Mapping[str, Any] | None = None,
        other_golds: Sequence[str] = (),
    ) -> Reward:
        """Return the rewards of one rollout.

        total = accuracy_weight x accuracy + format_weight x format
                + self_reward_weight x self_reward (vision_sr1 with images; 0 for an unpaid leak)

        With `question_only` the self-reward is max(value of `reading` - value of that, 0). Without
        the maximum, the baseline, which is the same for the whole group, would cancel out in the
        advantages.

        Args:
            sample_name: for messages.
            response_text: pass 1.
            gold: gold answer.
            question: with its options.
            description: of the response, or None.
            reading: pass 2, or None if it did not run.
            has_image: False means that there is nothing to describe, and no self-reward.
            question_only: pass 2 without a description, the baseline of the self-reward, or None.
            metadata: further columns of the sample, for the user's function.
            other_golds: further gold answers; an answer that equals any of them is right, and a
                description that states any of them is a leak.

        Raises:
            GradingLimit: a comparison exceeded the time or memory limit.
            GradingError: the gold answer is empty or cannot be compared, the grading process does
                not start, or the user's function failed.
        """
        golds = (gold, *other_golds)
        exceptions: list[str] = []

        def judge(text: str) -> float:
            best = 0.0
            for each in golds:
                if best < 1:
                    best = max(best, judge_by(each, text))
            return best

        def judge_by(gold: str, text: str) -> float:
            if self._user_reward is None:
                verdict = self._grader.judge(find_answer(text), gold, question, sample_name)
                if verdict.because.startswith(UNCOMPARABLE):
                    exceptions.append(verdict.because.removeprefix(UNCOMPARABLE))
                return float(verdict.right)
            return self._user_reward(
                sample_name,
                response=text,
                gold=gold,
                question=question,
                description=description,
                metadata=dict(metadata or {}),
            )

        try:
            accuracy = judge(response_text)
            self_reward: float | None = None
            if has_image and description is None and self._recipe == "vision_sr1":
                self_reward, reading = 0.0, None
            elif has_image and description is not None and reading is not None:
                self_reward = self._value(reading, judge)
                if question_only is not None:
                    baseline = self._value(question_only, judge)
                    self_reward = max(self_reward - baseline, 0.0)
        except GradingError as error:
            named = str(error).startswith(sample_name)
            message = str(error) if named else f"{sample_name}: {error}"
            raise type(error)(message) from error.__cause__
        leak = description is not None and any(
            _leaks(description, each, question, exceptions) for each in golds
        )
        has_right_format = has_format(response_text, self._recipe)
        is_paid = self._recipe == "vision_sr1" and (self._config.pay_leaks or not leak)
        paid = (self_reward or 0.0) if is_paid else 0.0
        return Reward(
            accuracy=accuracy,
            format=float(has_right_format),
            self_reward=self_reward,
            leak=leak,
            total=self._config.accuracy_weight * accuracy
            + self._config.format_weight * has_right_format
            + self._config.self_reward_weight * paid,
            answer=find_answer(response_text),
            reading_answer=find_answer(reading.texts[0]) if reading and reading.texts else None,
            uncomparable=exceptions[0] if exceptions else None,
        )

    def ungraded(self, response_text: str, has_image: bool) -> Reward:
        """Return zero rewards for a rollout that could not be graded."""
        return Reward(
            accuracy=0.0,
            format=0.0,
            self_reward=0.0 if has_image and self._recipe == "vision_sr1" else None,
            leak=False,
            total=0.0,
            answer=find_answer(response_text),
            reading_answer=None,
        )

    def _value(self, reading: Reading, judge: Callable[[str], float]) -> float:
        """Return the mean reward of the answers, or the reward of the likelihood, in [0, 1]."""
        if reading.gold_logprobs is not None:
            return likelihood_reward(
                reading.gold_logprobs, self._config.likelihood, self._config.likelihood_nats
            )
        return sum(judge(text) for text in reading.texts) / len(reading.texts)

    def close(self) -> None:
        """Stop the grading process; a later score starts a new one."""
        self._grader.close()

    def __enter__(self) -> Scorer:
        """Return self."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop the grading process."""
        self.close()


def _leaks(description: str, gold: str, question: str, exceptions: list[str]) -> bool:
    """Return True if a description states the answer, or if reading it raised."""
    try:
        return states_answer(description, gold, question)
    except Exception as error:
        exceptions.append(f"{type(error).__name__}: {error}")
        return True


def likelihood_reward(logprobs: Sequence[float], kind: str, nats: float) -> float:
    """Convert the likelihood of a gold answer to a reward in [0, 1].

    Args:
        logprobs: of its tokens, nats; one or more.
        kind: per_token: exp(mean) | probability: exp(sum) | linear: max(1 + sum / nats, 0).
        nats: for linear, the -log p at which the reward reaches 0.

    Raises:
        ConfigError: unknown kind.
    """
    total = sum(logprobs)
    if kind == "per_token":
        return math.exp(total / len(logprobs))
    if kind == "probability":
        return math.exp(total)
    if kind == "linear":
        return max(1.0 + total / nats, 0.0)
    raise ConfigError(f"reward.likelihood is {kind!r}; expected per_token | probability | linear")
