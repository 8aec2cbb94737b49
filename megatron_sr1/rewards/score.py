"""The rewards of a rollout, summed as its recipe says.

`0.9 x accuracy + 0.1 x format + 1.0 x self-reward` in Vision-SR1 (arXiv 2508.19652, v1); see_think
and vision_r1 pay the first two. Where there is no pass 2 by design the self-reward is absent; where
the description is missing it is 0.
"""

from __future__ import annotations

from megatron_sr1.records import Reward
from megatron_sr1.rewards.accuracy import is_right
from megatron_sr1.rewards.format import has_form
from megatron_sr1.rewards.leakage import states_answer
from megatron_sr1.rewards.parsing import last_boxed
from megatron_sr1.rewards.worker import MathWorker


class Scorer:
    """Scores rollouts under one recipe.

    Args:
        recipe: vision_sr1 | see_think | vision_r1.
        accuracy_weight: pays a right answer.
        format_weight: pays the form.
        self_reward_weight: pays a right pass-2 answer, in vision_sr1.
        pay_leaks: False: a description that states the answer earns no self-reward.
        grader_timeout_seconds: one comparison may take so long.
    """

    def __init__(
        self,
        recipe: str,
        *,
        accuracy_weight: float,
        format_weight: float,
        self_reward_weight: float,
        pay_leaks: bool,
        grader_timeout_seconds: float,
    ) -> None:
        """Start nothing yet; the grading process comes with the first mathematical answer."""
        self._recipe = recipe
        self._weights = (accuracy_weight, format_weight, self_reward_weight)
        self._pay_leaks = pay_leaks
        self._worker = MathWorker(grader_timeout_seconds)

    def score(
        self,
        *,
        sample_name: str,
        response_text: str,
        gold: str,
        question: str,
        description: str | None,
        reading_text: str | None,
        has_image: bool,
    ) -> Reward:
        """Judge one rollout.

        Args:
            sample_name: for errors.
            response_text: pass 1, whole.
            gold: the right answer.
            question: as asked.
            description: what pass 2 was given; None if there is none.
            reading_text: pass 2, whole; None if it did not run.
            has_image: text-only samples have no self-reward.

        Raises:
            GradingError: the grader broke or ran out of time; nothing is scored then.
        """
        answer = last_boxed(response_text)
        accuracy = float(is_right(answer, gold, question, self._worker, sample_name))
        form = float(has_form(response_text, self._recipe))
        reading_answer = None if reading_text is None else last_boxed(reading_text)
        self_reward: float | None = None
        if has_image and reading_text is not None:
            right = is_right(reading_answer, gold, question, self._worker, sample_name)
            self_reward = float(right)
        elif has_image and description is None and self._recipe != "vision_r1":
            self_reward = 0.0
        leak = description is not None and states_answer(description, gold, question)
        for_accuracy, for_form, for_self_reward = self._weights
        total = for_accuracy * accuracy + for_form * form
        if self._recipe == "vision_sr1" and self_reward and (self._pay_leaks or not leak):
            total += for_self_reward * self_reward
        return Reward(accuracy, form, self_reward, leak, total, answer, reading_answer)

    def close(self) -> None:
        """End the grading process."""
        self._worker.close()
