"""Evaluation on held-out questions: both passes, the four verdicts, the 2 x 2 table."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

from megatron_sr1.rewards.response import find_description
from megatron_sr1.rewards.score import Scorer
from megatron_sr1.rollout.engine import Engine
from megatron_sr1.rollout.readings import Pass2
from megatron_sr1.rollout.two_pass import roll_out
from megatron_sr1.runtime.rng import request_seed
from megatron_sr1.trainer import scoring
from megatron_sr1.trainer.context import Context
from megatron_sr1.trainer.samples import Samples
from megatron_sr1.trainer.sampling import pass2_settings, read_prompts

log = logging.getLogger(__name__)


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
            find_description=find_description,
            reading_prompt=samples.reading_prompt,
            # Every model judged meets the same randomness: comparisons are paired.
            seed_of=lambda index, sample, part: request_seed(0, -1, index, sample, part),
        )
        speaks = engine.is_speaker
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
