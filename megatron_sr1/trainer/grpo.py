"""GRPO with self-reward: roll out, score, learn, sync.

Source: GRPO with a clipped ratio and the k3 penalty as Vision-SR1 uses it (arXiv 2508.19652).
The objective (trainer/objective.py) is a mean over an update, by default over all its response
tokens. Left out: a critic, an entropy bonus, a length penalty.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from megatron_sr1.config.run import Config
from megatron_sr1.records import TrainSample
from megatron_sr1.rewards.score import Scorer
from megatron_sr1.rollout.engine import Engine
from megatron_sr1.trainer import scoring
from megatron_sr1.trainer.actor import Actor, Reference
from megatron_sr1.trainer.canary import Canary
from megatron_sr1.trainer.context import Context
from megatron_sr1.trainer.credit import Credit
from megatron_sr1.trainer.objective import grpo_loss
from megatron_sr1.trainer.samples import Samples
from megatron_sr1.trainer.sampling import credit_of, roll_out_step
from megatron_sr1.trainer.step import named, sample_logprobs, update


def train_grpo(
    context: Context,
    actor: Actor,
    engine: Engine,
    samples: Samples,
    scorer: Scorer,
    reference: Reference | None,
    rate: Callable[[], dict[str, float]] | None = None,
) -> None:
    """Run the GRPO steps that are left, saving and logging as configured.

    Args:
        context: configuration, groups, run directory, sinks, loader.
        actor: with its optimizer.
        engine: holds any weights; it is synced before it samples.
        samples: the training set.
        scorer: of the recipe.
        reference: frozen weights of the KL term; None where its coefficient is 0.
        rate: evaluates the actor before a save, for `checkpoint.keep_best`.
    """
    config = context.config
    bound = config.rollout.canary_bound
    canary = Canary(samples, bound) if bound else None
    started_at = context.step
    while context.has_steps_left:
        step = context.step
        sync(context, actor, engine, version=step, again=step > started_at)
        agreed = canary.check(context, actor, engine) if canary else {}
        scored, stats = roll_out_step(context, engine, samples, scorer, step)
        given, spread = credit_of(scored, config)
        chosen, filtered = chosen_groups(given, config)
        own = own_samples(context, samples, scored, given, chosen)
        measured = learn(context, actor, samples, own, reference)
        values = {
            **scoring.reward_means(scored),
            **spread,
            **filtered,
            **stats,
            **measured,
            **agreed,
        }
        values["reward/ungraded"] = float(context.ungraded)
        if context.is_writer:
            context.record_rollouts(rollout_lines(step + 1, samples, scored, given), samples)
        samples.forget()
        context.finish_step("grpo", values, actor, rate)


def sync(context: Context, actor: Actor, engine: Engine, version: int, again: bool = False) -> None:
    """Wake the engine and stream the actor's weights into it.

    Args:
        context: of the run.
        actor: whose weights.
        engine: that takes them.
        version: number that rollouts carry from now on.
        again: the engine's weights came from this actor: those that do not learn need not come.
    """
    with context.phase("sync"):
        left_out = actor.frozen if again and engine.keeps_weights else frozenset[str]()
        actor.make_room(context.config.rollout.make_room)
        engine.wake()
        engine.sync(actor.weights(left_out), version, whole=not left_out)


def chosen_groups(given: Credit, config: Config) -> tuple[list[int], dict[str, float]]:
    """The groups to learn from, and how many were dropped.

    Without the filter these are all. With it, those that teach; if none does, the first of them,
    as many as a step has: then the KL term alone moves the actor, as it would without the filter.
    """
    everyone = list(range(len(given.advantages)))
    if not config.algorithm.filter_groups:
        return everyone, {}
    teaching = given.teaching
    return teaching or everyone[: config.data.prompts_per_step], {
        "filter/dropped_groups": float(len(everyone) - len(teaching)),
        "filter/kept_groups": float(len(teaching)),
    }


def rollout_lines(
    step: int, samples: Samples, scored: Sequence[scoring.Scored], given: Credit
) -> list[dict[str, Any]]:
    """Lines of rollouts/step_N.jsonl; with credit by span each names both its advantages."""
    lines = []
    for number, item in enumerate(scored):
        advantage, description = given.of(*divmod(number, given.advantages.shape[1]))
        example = samples.example(item.rollout.index)
        line = scoring.rollout_line(step, item, example, advantage)
        lines.append(line if description is None else line | {"description_advantage": description})
    return lines


def own_samples(
    context: Context,
    samples: Samples,
    scored: Sequence[scoring.Scored],
    given: Credit,
    chosen: Sequence[int],
) -> list[list[TrainSample]]:
    """This data-parallel rank's share of each update of the step, made of the chosen groups.

    A rank that would have none gets one sample without targets, so that all ranks take part.
    """
    n = context.config.rollout.samples_per_prompt
    per_update = context.config.algorithm.prompts_per_update
    updates = []
    for start in range(0, len(chosen), per_update):
        of_update = [g * n + k for g in chosen[start : start + per_update] for k in range(n)]
        mine = context.share([samples.size(scored[number].rollout) for number in of_update])
        own = [
            samples.train_sample(scored[number].rollout, *given.of(*divmod(number, n)))
            for number in (of_update[place] for place in mine)
        ]
        if not own:
            spare = samples.train_sample(scored[of_update[0]].rollout, 0.0)
            own = [replace(spare, loss_mask=np.zeros_like(spare.loss_mask))]
        updates.append(own)
    return updates


def learn(
    context: Context,
    actor: Actor,
    samples: Samples,
    updates: list[list[TrainSample]],
    reference: Reference | None,
) -> dict[str, float]:
    """All updates of a step: old and reference logprobs first, as the weights then move.

    With a single update the policy's own logprobs are the old ones, and that pass is left out.
    """
    config = context.config
    temperature = config.rollout.temperature
    if len(updates) > 1:
        with context.phase("old_logprobs"):
            updates = _with_logprobs(context, actor, samples, updates, "old_logprobs")
    if reference is not None:
        with context.phase("reference"), reference.in_place():
            updates = _with_logprobs(context, actor, samples, updates, "reference_logprobs")
    measured: list[dict[str, float]] = []
    if context.groups.speaks_for_samples:
        own = [sample for chosen in updates for sample in chosen]
        context.throughput.count_samples("update", own)
        if len(updates) > 1:
            context.throughput.count_samples("old_logprobs", own)
        if reference is not None:
            context.throughput.count_samples("reference", own)
    with context.phase("update"):
        for chosen in updates:
            batches = context.pack(chosen, samples)
            objective = grpo_loss(
                config.algorithm, config.rollout.mismatch_bound, config.rollout.max_response_tokens
            )
            measured.append(update(actor, batches, objective, temperature))
    return named(measured)


def _with_logprobs(
    context: Context,
    actor: Actor,
    samples: Samples,
    updates: list[list[TrainSample]],
    field: str,
) -> list[list[TrainSample]]:
    temperature = context.config.rollout.temperature
    filled = []
    for chosen in updates:
        logprobs = sample_logprobs(actor, chosen, context.pack(chosen, samples), temperature)
        changes: list[dict[str, Any]] = [{field: row} for row in logprobs]
        filled.append([replace(s, **c) for s, c in zip(chosen, changes, strict=True)])
    return filled
