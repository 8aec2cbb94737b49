"""The rewards of one rollout and their sum.

In: a response, its gold answer, its description, what was read from that. Out: a `Reward`.
Source: Vision-SR1 (arXiv 2508.19652 v1, section 3.2): accuracy, format and self-reward, weighted
and added. Unlike its code, a response without a description has no second pass and no
self-reward, a description that states the answer is flagged, and a grader that breaks raises.
Answers are judged by the grader (accuracy.py) or by a function of the user's (own.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any

from megatron_sr1.errors import ConfigError, GradingError
from megatron_sr1.records import Reward
from megatron_sr1.rewards.accuracy import is_right
from megatron_sr1.rewards.format import BLOCKS, has_form
from megatron_sr1.rewards.leakage import states_answer
from megatron_sr1.rewards.own import OwnReward
from megatron_sr1.rewards.parsing import find_answer
from megatron_sr1.rewards.worker import MathWorker


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
        grader_timeout_seconds: float = 5.0,
        own: OwnReward | None = None,
    ) -> None:
        """Take the weights; the grading process starts when algebra is first needed.

        Args:
            recipe: vision_sr1 | see_think | vision_r1.
            accuracy_weight: pays a right answer.
            format_weight: pays the recipe's form.
            self_reward_weight: pays a right reading, in recipe vision_sr1 only.
            pay_leaks: False takes the self-reward from descriptions that state the answer.
            grader_timeout_seconds: one comparison may take so long.
            own: judges answers in place of the grader.

        Raises:
            ConfigError: unknown recipe.
        """
        if recipe not in BLOCKS:
            raise ConfigError(f"reward.recipe is {recipe!r}; expected {' | '.join(BLOCKS)}")
        self._recipe = recipe
        self._accuracy_weight, self._format_weight = accuracy_weight, format_weight
        self._self_reward_weight = self_reward_weight if recipe == "vision_sr1" else 0.0
        self._pay_leaks, self._own = pay_leaks, own
        self._worker = MathWorker(grader_timeout_seconds)

    def score(
        self,
        sample_name: str,
        response_text: str,
        gold: str,
        question: str,
        description: str | None,
        reading_text: str | None,
        has_image: bool,
        metadata: Mapping[str, Any] | None = None,
    ) -> Reward:
        """Judge one rollout.

        total = accuracy_weight x accuracy + format_weight x format
                + self_reward_weight x self_reward (vision_sr1 with images; 0 if an unpaid leak)

        Args:
            sample_name: for messages.
            response_text: pass 1.
            gold: gold answer.
            question: as asked, with its options.
            description: of the response, None if it has none.
            reading_text: pass 2, None if it did not run.
            has_image: whether the sample has images; without, there is nothing to describe.
            metadata: further columns of the sample, for a function of the user's.

        Raises:
            GradingLimit: a comparison ran out of time or memory.
            GradingError: no gold answer, or the grader broke.
        """

        def judge(text: str) -> float:
            if self._own is None:
                return float(is_right(text, gold, question, compare))
            return self._own(
                sample_name,
                response=text,
                gold=gold,
                question=question,
                description=description,
                metadata=dict(metadata or {}),
            )

        def compare(gold: str, answer: str) -> bool:
            return self._worker.equal(gold, answer, sample_name)

        try:
            accuracy = judge(response_text)
            self_reward: float | None = None
            if has_image and description is None and self._recipe == "vision_sr1":
                self_reward, reading_text = 0.0, None
            elif has_image and description is not None and reading_text is not None:
                self_reward = judge(reading_text)
            leak = description is not None and states_answer(description, gold, question)
        except GradingError as error:
            named = str(error).startswith(sample_name)
            message = str(error) if named else f"{sample_name}: {error}"
            raise type(error)(message) from error.__cause__
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
            reading_answer=None if reading_text is None else find_answer(reading_text),
        )

    def close(self) -> None:
        """End the grading process; a later score starts a new one."""
        self._worker.close()

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
