"""The rewards of one rollout and their sum.

In: a response, its gold answer, its description, what was read from that. Out: a `Reward`.
Source: Vision-SR1 (arXiv 2508.19652 v1, section 3.2): accuracy, format and self-reward, weighted
and added. Unlike its code, a response without a description has no second pass and no
self-reward, a description that states the answer is flagged, and a grader that breaks raises.
Answers are judged by the grader (grader.py) or by a function of the user's (own.py). A user's
function that raises stops the run; sampled text never does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any

from megatron_sr1.errors import ConfigError, GradingError
from megatron_sr1.records import Reading, Reward
from megatron_sr1.rewards.grader import UNCOMPARABLE, Grader
from megatron_sr1.rewards.leakage import states_answer
from megatron_sr1.rewards.response import BLOCKS, find_answer, has_form
from megatron_sr1.rewards.user_reward import UserReward


class Scorer:
    """Judges rollouts of one recipe; use it in a `with`, or close it."""

    def __init__(
        self,
        recipe: str,
        *,
        accuracy_weight: float = 0.9,
        format_weight: float = 0.1,
        self_reward_weight: float = 1.0,
        pay_leaks: bool = True,
        likelihood: str = "per_token",
        likelihood_nats: float = 10.0,
        grader: str = "rules",
        grader_timeout_seconds: float = 5.0,
        own: UserReward | None = None,
    ) -> None:
        """Take the weights; the grading process starts when algebra is first needed.

        Args:
            recipe: vision_sr1 | see_think | vision_r1.
            accuracy_weight: pays a right answer.
            format_weight: pays the recipe's form.
            self_reward_weight: pays a right reading, in recipe vision_sr1 only.
            pay_leaks: False takes the self-reward from descriptions that state the answer.
            likelihood: per_token | probability | linear, where the gold answer was scored.
            likelihood_nats: of linear.
            grader: rules | math_verify.
            grader_timeout_seconds: one comparison may take so long.
            own: judges answers in place of the grader.

        Raises:
            ConfigError: unknown recipe or grader.
        """
        if recipe not in BLOCKS:
            raise ConfigError(f"reward.recipe is {recipe!r}; expected {' | '.join(BLOCKS)}")
        self._recipe = recipe
        self._accuracy_weight, self._format_weight = accuracy_weight, format_weight
        self._self_reward_weight = self_reward_weight if recipe == "vision_sr1" else 0.0
        self._pay_leaks, self._own = pay_leaks, own
        self._of_logprobs = partial(likelihood_reward, kind=likelihood, nats=likelihood_nats)
        self._grader = Grader(grader, grader_timeout_seconds)

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
        """Judge one rollout.

        With a question_only the self-reward is max(worth of reading - worth of that, 0). Without
        the maximum it would be lost again in the mean of the group, as it is one for all of them.

        total = accuracy_weight x accuracy + format_weight x format
                + self_reward_weight x self_reward (vision_sr1 with images; 0 if an unpaid leak)

        Args:
            sample_name: for messages.
            response_text: pass 1.
            gold: gold answer.
            question: as asked, with its options.
            description: of the response, None if it has none.
            reading: pass 2, None if it did not run.
            has_image: whether the sample has images; without, there is nothing to describe.
            question_only: pass 2 of the question alone, whose worth is taken off; None: nothing is.
            metadata: further columns of the sample, for a function of the user's.
            other_golds: further gold answers: what is right by any of them is right, and a
                description leaks that states any.

        Raises:
            GradingLimit: a comparison ran out of time or memory.
            GradingError: no gold answer or one that cannot be compared, the grader does not start,
                or the user's function failed.
        """
        golds = (gold, *other_golds)
        raised: list[str] = []

        def judge(text: str) -> float:
            best = 0.0
            for each in golds:
                if best < 1:
                    best = max(best, judge_by(each, text))
            return best

        def judge_by(gold: str, text: str) -> float:
            if self._own is None:
                verdict = self._grader.judge(find_answer(text), gold, question, sample_name)
                if verdict.because.startswith(UNCOMPARABLE):
                    raised.append(verdict.because.removeprefix(UNCOMPARABLE))
                return float(verdict.right)
            return self._own(
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
                self_reward = self._worth(reading, judge)
                if question_only is not None:
                    alone = self._worth(question_only, judge)
                    self_reward = max(self_reward - alone, 0.0)
        except GradingError as error:
            named = str(error).startswith(sample_name)
            message = str(error) if named else f"{sample_name}: {error}"
            raise type(error)(message) from error.__cause__
        leak = description is not None and any(
            _leaks(description, each, question, raised) for each in golds
        )
        form = has_form(response_text, self._recipe)
        paid = 0.0 if leak and not self._pay_leaks else self_reward or 0.0
        return Reward(
            accuracy=accuracy,
            format=float(form),
            self_reward=self_reward,
            leak=leak,
            total=self._accuracy_weight * accuracy
            + self._format_weight * form
            + self._self_reward_weight * paid,
            answer=find_answer(response_text),
            reading_answer=find_answer(reading.texts[0]) if reading and reading.texts else None,
            uncomparable=raised[0] if raised else None,
        )

    def ungraded(self, response_text: str, has_image: bool) -> Reward:
        """Verdicts on a rollout that could not be graded: it earns nothing.

        Args:
            response_text: pass 1.
            has_image: whether the sample has images.
        """
        return Reward(
            accuracy=0.0,
            format=0.0,
            self_reward=0.0 if has_image and self._recipe == "vision_sr1" else None,
            leak=False,
            total=0.0,
            answer=find_answer(response_text),
            reading_answer=None,
        )

    def _worth(self, reading: Reading, judge: Callable[[str], float]) -> float:
        """What the answers are worth on average, or the gold answer's likelihood, in [0, 1]."""
        if reading.gold_logprobs is not None:
            return self._of_logprobs(reading.gold_logprobs)
        return sum(judge(text) for text in reading.texts) / len(reading.texts)

    def close(self) -> None:
        """End the grading process; a later score starts a new one."""
        self._grader.close()

    def __enter__(self) -> Scorer:
        """Itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close."""
        self.close()


def _leaks(description: str, gold: str, question: str, raised: list[str]) -> bool:
    """Whether a description states the answer; one that cannot be read counts as if it did."""
    try:
        return states_answer(description, gold, question)
    except Exception as error:
        raised.append(f"{type(error).__name__}: {error}")
        return True


def likelihood_reward(logprobs: Sequence[float], kind: str, nats: float) -> float:
    """A gold answer's likelihood as a reward in [0, 1].

    Args:
        logprobs: of each of its tokens, nats; one or more.
        kind: per_token: exp(mean) | probability: exp(sum) | linear: max(1 + sum / nats, 0).
        nats: of linear: -log p where the reward ends.

    Raises:
        ConfigError: another kind.
    """
    total = sum(logprobs)
    if kind == "per_token":
        return math.exp(total / len(logprobs))
    if kind == "probability":
        return math.exp(total)
    if kind == "linear":
        return max(1.0 + total / nats, 0.0)
    raise ConfigError(f"reward.likelihood is {kind!r}; expected per_token | probability | linear")
