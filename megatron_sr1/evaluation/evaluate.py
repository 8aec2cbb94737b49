"""Evaluate a model on held-out questions: both passes, the four verdicts, their rates."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial
from typing import Any

from megatron_sr1.config.run import Config
from megatron_sr1.records import RIGHT_FROM, Example, Prompt
from megatron_sr1.rewards.response import find_description
from megatron_sr1.rewards.score import Scorer, is_exact, rates
from megatron_sr1.rollout.engine import Engine
from megatron_sr1.rollout.two_pass import RolloutHooks, roll_out
from megatron_sr1.runtime.rng import request_seed
from megatron_sr1.trainer import rollouts
from megatron_sr1.trainer.context import Context
from megatron_sr1.trainer.rollouts import Scored
from megatron_sr1.trainer.samples import Samples

log = logging.getLogger(__name__)


class HeldOut:
    """Evaluates the engine's weights, always on the same questions with the same seeds."""

    def __init__(self, context: Context, engine: Engine, samples: Samples, scorer: Scorer) -> None:
        """Select the first `data.eval_limit` questions of `samples`, those of `data.eval`."""
        self.samples = samples
        self._context, self._engine, self._scorer = context, engine, scorer
        self._indices = range(len(samples))[: context.config.data.eval_limit or None]

    def prompts(self) -> list[Prompt]:
        """Read this replica's questions; unusable ones count for each evaluation by itself."""
        context = self._context
        of_training, context.skipped = context.skipped, 0
        prompts = rollouts.read_prompts(context, self._engine, self.samples, self._indices)
        context.skipped = of_training
        return prompts

    def evaluate(self, name: str, temperature: float) -> dict[str, float]:
        """Answer the questions and save every verdict in `eval/{name}.jsonl`.

        `temperature` is that of pass 1; 0 is greedy. Pass 2 is as configured, but always one
        answer, so that it is right or wrong.

        Returns:
            accuracy, self_reward, description_exact and shortcut_rate, those that apply, in [0, 1],
            over the questions that could be graded; `ungraded` counts the others. If none could,
            all are wrong.
        """
        context, engine, samples = self._context, self._engine, self.samples
        config = context.config
        with context.phase("evaluate"):
            found, _ = roll_out(
                engine,
                self.prompts(),
                replace(
                    config.rollout,
                    samples_per_prompt=1,
                    temperature=temperature,
                    pass2_mode="generate",
                    pass2_samples=1,
                ),
                RolloutHooks(
                    find_description,
                    None if config.reward.recipe == "vision_r1" else samples.reading_prompt,
                    # The same seeds for every model, so that comparisons are paired.
                    partial(request_seed, 0, -1),
                ),
            )
            own = found if engine.is_replica_leader else ()
            scored = rollouts.score(own, samples, self._scorer)
            scored = rollouts.gather_scored(scored, self._indices, context.groups)
        usable, limits = rollouts.without_ungraded(scored)
        if any(s.limit for s in usable):
            log.warning("NO QUESTION COULD BE GRADED; all count as wrong, see the warnings above")
        lines = [evaluation_line(s, samples.example(s.rollout.index)) for s in usable]
        context.save_lines(f"eval/{name}.jsonl", lines)
        return {**rates(lines), "ungraded": len(limits)}


def evaluation_scorer(config: Config) -> Scorer:
    """Return the scorer of an evaluation.

    With see_think it reads descriptions too, so that the tables can be compared.
    """
    recipe = "vision_r1" if config.reward.recipe == "vision_r1" else "vision_sr1"
    return Scorer(replace(config.reward, recipe=recipe))


def evaluation_line(scored: Scored, example: Example) -> dict[str, Any]:
    """Return a line of an evaluation file: the texts and the four verdicts, 0, 1 or null.

    Accuracy and self-reward are what the user's reward function gave, if there is one.
    """
    rollout, reward = scored.rollout, scored.reward
    expected = example.metadata.get("expected_description", example.metadata.get("digits"))
    exact = None if expected is None else int(is_exact(rollout.description or "", expected))
    shortcut = None
    if reward.self_reward is not None:
        shortcut = int(reward.accuracy >= RIGHT_FROM > reward.self_reward)
    return {
        "index": rollout.index,
        **rollouts.texts(rollout, example),
        "accuracy": _short(reward.accuracy),
        "self_reward": _short(reward.self_reward),
        "description_exact": exact,
        "shortcut": shortcut,
    }


def _short(verdict: float | None) -> float | None:
    """Convert 0.0 and 1.0 to int, for the file."""
    return int(verdict) if verdict in (0.0, 1.0) else verdict
