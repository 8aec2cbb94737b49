"""Evaluate a model on held-out questions: both passes, the four verdicts, the 2 x 2 table."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

from megatron_sr1.config.run import Config
from megatron_sr1.rewards.response import find_description
from megatron_sr1.rewards.score import Scorer
from megatron_sr1.rollout.engine import Engine
from megatron_sr1.rollout.pass2 import Pass2, RolloutHooks
from megatron_sr1.rollout.two_pass import roll_out
from megatron_sr1.runtime.rng import request_seed
from megatron_sr1.trainer import scoring, setup
from megatron_sr1.trainer.context import Context
from megatron_sr1.trainer.samples import Samples
from megatron_sr1.trainer.sampling import pass2_settings, read_prompts

log = logging.getLogger(__name__)


WAYS = ("sampled", "greedy")


class HeldOut:
    """Evaluates what the engine holds, always on the same questions with the same seeds.

    Args:
        context: where the verdicts are saved; its configuration names the set.
        engine: of this rank.
        scorer: from `evaluation_scorer`.
    """

    def __init__(self, context: Context, engine: Engine, scorer: Scorer) -> None:
        """Open `data.eval`."""
        config = context.config
        self._context, self._engine, self._scorer = context, engine, scorer
        self.samples = setup.open_samples(config, config.data.eval, context.processor)
        self._indices = range(len(self.samples))[: config.data.eval_limit or None]

    def judge(self, name: str, temperature: float) -> dict[str, float]:
        """Answer the questions and save `eval/{name}.jsonl`; returns what `evaluate` does."""
        return evaluate(
            self._context,
            self._engine,
            self.samples,
            self._scorer,
            name,
            temperature=temperature,
            indices=self._indices,
        )


def evaluation_scorer(config: Config) -> Scorer:
    """Return the scorer of an evaluation.

    It reads see_think's descriptions too, so that its table can be compared.
    """
    return setup.make_scorer(config, None if config.reward.recipe == "vision_r1" else "vision_sr1")


def evaluate(
    context: Context,
    engine: Engine,
    samples: Samples,
    scorer: Scorer,
    name: str,
    *,
    temperature: float,
    indices: Sequence[int],
) -> dict[str, float]:
    """Answer held-out questions with the engine's present weights and save every verdict.

    Args:
        context: where to and with which groups.
        engine: holds the weights to judge, awake.
        samples: the held-out set.
        scorer: grades; what the recipe pays does not matter here.
        name: the file is `eval/{name}.jsonl`.
        temperature: of pass 1; 0 is greedy. Pass 2 is as configured, but always one answer, so
            that it is right or wrong.
        indices: which samples.

    Returns:
        accuracy, self_reward, description_exact and shortcut_rate, those that apply, in [0, 1],
        over the questions that could be graded; `ungraded` counts the others. Where none could,
        all are wrong.
    """
    config = context.config
    with_pass2 = config.reward.recipe != "vision_r1"
    with context.phase("evaluate"):
        rollouts, _ = roll_out(
            engine,
            read_prompts(context, engine, samples, indices),
            samples_per_prompt=1,
            temperature=temperature,
            max_response_tokens=config.rollout.max_response_tokens,
            pass2=one_answer(pass2_settings(config)) if with_pass2 else None,
            hooks=RolloutHooks(
                find_description,
                samples.reading_prompt,
                # The same seeds for every model that is judged: comparisons are paired.
                lambda index, sample, part: request_seed(0, -1, index, sample, part),
            ),
        )
        speaks = engine.is_replica_leader
        graded = scoring.score(rollouts if speaks else (), samples, scorer)
        graded = scoring.share(graded, indices, speaks, context.groups)
    if graded.ungraded and not graded.scored:
        log.warning("NO QUESTION COULD BE GRADED; all count as wrong, see the warnings above")
    lines = [scoring.evaluation_line(s, samples.example(s.rollout.index)) for s in graded.usable]
    context.save_lines(f"eval/{name}.jsonl", lines)
    return {**scoring.rates(lines), "ungraded": len(graded.ungraded)}


def one_answer(pass2: Pass2) -> Pass2:
    """The same pass 2 with a single answer to each description."""
    return replace(pass2, mode="generate", num_samples=1, question_only=False)
