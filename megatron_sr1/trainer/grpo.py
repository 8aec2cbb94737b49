"""GRPO with self-reward: sync, roll out both passes, reward, learn.

Source: GRPO with a clipped ratio and the k3 penalty as Vision-SR1 uses it (arXiv 2508.19652).
The objective (trainer/objective.py) is a mean over an update, by default over all its response
tokens. Left out: a critic, an entropy bonus.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from megatron_sr1.config.run import Config
from megatron_sr1.records import PackedBatch, TrainSample
from megatron_sr1.rewards.grading_pool import GradingPool
from megatron_sr1.rollout.engine import Engine
from megatron_sr1.rollout.text_stats import step_metrics
from megatron_sr1.runtime.groups import gather_objects
from megatron_sr1.trainer.actor import Actor, Reference
from megatron_sr1.trainer.context import Context, Evaluate
from megatron_sr1.trainer.objective import Credit, credit, grpo_loss
from megatron_sr1.trainer.rollouts import (
    Scored,
    reward_means,
    roll_out_step,
    rollout_line,
    set_means,
)
from megatron_sr1.trainer.samples import Samples, without_targets
from megatron_sr1.trainer.step import named, row_logprobs, update
from megatron_sr1.trainer.sync import Canary, sync


def train_grpo(
    context: Context,
    actor: Actor,
    engine: Engine,
    samples: Samples,
    grading: GradingPool,
    reference: Reference | None,
    evaluate: Evaluate | None = None,
) -> None:
    """Run the GRPO steps that are left.

    `reference` holds the frozen weights of the KL term, if its coefficient is not 0; `evaluate`
    is called as `Context.finish_step` says.
    """
    config, started_at = context.config, context.step
    bound = config.rollout.canary_bound
    canary = Canary(samples, bound) if bound else None
    objective = grpo_loss(config.algorithm, config.rollout)
    world = context.groups.world
    data_ranks = gather_objects(context.groups.data.rank, world)
    homes = data_ranks[:: world.size // engine.num_replicas]  # of each replica's leader
    context.evaluate_at_start(evaluate)
    while context.has_steps_left:
        sync(context, actor, engine, again=context.step > started_at)
        agreement = canary.check(context, actor, engine) if canary else {}

        scored, counted = roll_out_step(context, engine, samples, grading)
        credited, spread = credit([s.reward for s in scored], config)
        chosen, filtered = chosen_groups(credited, config)

        with context.phase("pack"):
            owned = own_samples(context, samples, scored, credited, chosen, homes)
            updates = [samples.pack(own, context.groups) for own in owned]
            samples.forget_pixels()
        read_ahead(context, engine, samples)
        updates = with_logprobs(context, actor, owned, updates, reference)
        measured = []
        write = partial(record, context, samples, scored, credited)
        with context.writing(write) as recorded, context.phase("update"):
            for own in owned:
                # Its rows have the only copy of their pixels, which nothing here keeps.
                temperature = config.rollout.temperature
                measured.append(update(actor, updates.pop(0), objective, temperature))
                context.throughput.count_samples("update", own)

        values = {**recorded, **spread, **filtered, **counted, **named(measured), **agreement}
        values["reward/ungraded"] = float(context.ungraded)
        samples.forget()
        with context.phase("prompts"):
            samples.pixels.finish()
        context.finish_step(values, actor, evaluate)


def record(
    context: Context, samples: Samples, scored: Sequence[Scored], credited: Credit
) -> dict[str, float]:
    """Write and show a step's rollouts; return the metrics of their rewards and texts."""
    lines = []
    for number, item in enumerate(scored):
        index = item.rollout.index
        facts = (credited.advantages_of(number), samples.set_of(index))
        lines.append(rollout_line(context.step + 1, item, samples.example(index), *facts))
    context.record_rollouts(lines, samples.images)
    texts = step_metrics([s.rollout for s in scored], samples.processor.encode)
    return {**reward_means(scored), **set_means(scored, samples.set_of), **texts}


def read_ahead(context: Context, engine: Engine, samples: Samples) -> None:
    """Start to read the images of this replica's next prompts, while the actor learns."""
    if context.step + 1 < context.config.num_steps:
        samples.pixels.start(context.loader.upcoming()[engine.replica :: engine.num_replicas])


def chosen_groups(credited: Credit, config: Config) -> tuple[list[int], dict[str, float]]:
    """Return the groups to learn from, and how many were dropped.

    Without the filter these are all groups, otherwise those with a spread of rewards. If there is
    none, the first `prompts_per_step` remain: then only the KL term moves the actor, as it would
    without the filter.
    """
    everyone = list(range(len(credited.advantages)))
    if not config.algorithm.filter_groups:
        return everyone, {}
    teaching = credited.teaching
    return teaching or everyone[: config.data.prompts_per_step], {
        "filter/dropped_groups": float(len(everyone) - len(teaching)),
        "filter/kept_groups": float(len(teaching)),
    }


def own_samples(
    context: Context,
    samples: Samples,
    scored: Sequence[Scored],
    credited: Credit,
    chosen: Sequence[int],
    homes: Sequence[int],
) -> list[list[TrainSample]]:
    """Return this data-parallel rank's part of each update of the step, from the chosen groups.

    `homes` is the data-parallel rank of each engine replica, which has read its prompts' images.
    """
    n = context.config.rollout.samples_per_prompt
    per_update = context.config.algorithm.prompts_per_update

    def sample(number: int) -> TrainSample:
        return samples.train_sample(scored[number].rollout, **credited.advantages_of(number))

    updates = []
    for start in range(0, len(chosen), per_update):
        of_update = [g * n + k for g in chosen[start : start + per_update] for k in range(n)]
        rollouts = [scored[number].rollout for number in of_update]
        sizes = [samples.size(r)._replace(home=homes[r.replica]) for r in rollouts]
        own = [of_update[place] for place in samples.own_places(sizes, context.groups.data)]
        samples.pixels.start(scored[number].rollout.index for number in own)  # other replicas'
        updates.append(list(map(sample, own)) or [without_targets(sample(of_update[0]))])
    return updates


def with_logprobs(
    context: Context,
    actor: Actor,
    owned: Sequence[Sequence[TrainSample]],
    updates: list[list[PackedBatch]],
    reference: Reference | None,
) -> list[list[PackedBatch]]:
    """Add old and reference logprobs to the rows of all updates, before the weights change.

    `owned` are the samples in them. In the first update the policy's own logprobs are the old ones,
    which saves that pass.
    """

    def add(field: str, phase: str, first: int = 0) -> list[list[PackedBatch]]:
        filled = updates[:first]
        for own, batches in zip(owned[first:], updates[first:], strict=True):
            rows = row_logprobs(actor, batches, context.config.rollout.temperature)
            changes: list[dict[str, Any]] = [{field: row} for row in rows]
            filled.append([replace(b, **c) for b, c in zip(batches, changes, strict=True)])
            context.throughput.count_samples(phase, own)
        return filled

    actor.restore_weights()
    if len(updates) > 1:
        with context.phase("old_logprobs"):
            updates = add("old_logprobs", "old_logprobs", first=1)
    if reference is not None:
        actor.offload("gradients")  # unless it is done: the reference takes their memory
        with context.phase("reference"), reference.in_place():
            updates = add("reference_logprobs", "reference")
    return updates
