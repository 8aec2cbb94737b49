"""GRPO with self-reward: sync, roll out both passes, reward, learn.

Source: GRPO with a clipped ratio and the k3 penalty as Vision-SR1 uses it (arXiv 2508.19652).
The objective (trainer/objective.py) is a mean over an update, by default over all its response
tokens. Left out: a critic, an entropy bonus.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any

from megatron_sr1.config.run import Config
from megatron_sr1.records import PackedBatch, Rollout, TrainSample
from megatron_sr1.rewards.answered import Key
from megatron_sr1.rewards.grading_pool import GradingPool
from megatron_sr1.rollout.engine import Engine
from megatron_sr1.rollout.text_stats import step_metrics
from megatron_sr1.runtime.groups import Groups, gather_objects, gather_on_first
from megatron_sr1.trainer.actor import Actor, Reference
from megatron_sr1.trainer.context import Context, Evaluate
from megatron_sr1.trainer.objective import Credit, credit, grpo_loss
from megatron_sr1.trainer.rollouts import (
    Held,
    Outcome,
    Scored,
    exchange,
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
    served = served_replicas(context.groups, engine)
    context.evaluate_at_start(evaluate)
    while context.has_steps_left:
        sync(context, actor, engine, again=context.step > started_at)
        agreement = canary.check(context, actor, engine) if canary else {}

        outcomes, held, counted = roll_out_step(context, engine, samples, grading)
        credited, spread = credit([outcome.reward for outcome in outcomes], config)
        chosen, filtered = chosen_groups(credited, config)

        with context.phase("pack"):
            rolled_out = outcomes, held, engine.is_replica_leader
            owned = own_samples(context, samples, *rolled_out, credited, chosen, served)
            updates = [samples.pack(own, context.groups) for own in owned]
            samples.forget_pixels()
        read_ahead(context, engine, samples)
        updates = with_logprobs(context, actor, owned, updates, reference)
        measured = []
        sampled = list(held.values()) if engine.is_replica_leader else []
        write = partial(record, context, samples, sampled, outcomes, credited)
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
    context: Context,
    samples: Samples,
    sampled: Sequence[Rollout],
    outcomes: Sequence[Outcome],
    credited: Credit,
) -> dict[str, float]:
    """Write and show a step's rollouts; return the metrics of their rewards and texts.

    Collective over all ranks: a replica's leader sends what it `sampled`; the writer alone gets all
    of it, and has metrics.
    """
    parts = gather_on_first(sampled, context.groups.background)
    if not context.is_writer:
        return {}
    found = {rollout.key: rollout for part in parts for rollout in part}
    scored = [Scored(found[each.key], each.reward, each.limit) for each in outcomes]
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


def served_replicas(groups: Groups, engine: Engine) -> list[int | None]:
    """Return for each data-parallel rank the engine replica of all its ranks, None if several."""
    found: dict[int, set[int]] = defaultdict(set)
    for rank, replica in gather_objects((groups.data.rank, engine.replica), groups.world):
        found[rank].add(replica)
    return [min(found[rank]) if len(found[rank]) == 1 else None for rank in sorted(found)]


def own_samples(
    context: Context,
    samples: Samples,
    outcomes: Sequence[Outcome],
    held: Held,
    is_leader: bool,
    credited: Credit,
    chosen: Sequence[int],
    served: Sequence[int | None],
) -> list[list[TrainSample]]:
    """Return this data-parallel rank's part of each update of the step, from the chosen groups.

    Collective over all ranks. `held` are the rollouts of this rank's engine replica, which its
    leader sends to others; `served` is as `served_replicas` returns it. A rank without a sample in
    an update has one that teaches nothing.
    """
    n, rank = context.config.rollout.samples_per_prompt, context.groups.data.rank
    per_update = context.config.algorithm.prompts_per_update
    shares: list[list[list[int]]] = []  # of each update and data-parallel rank
    wanted: list[list[Key]] = [[] for _ in served]
    for start in range(0, len(chosen), per_update):
        of_update = [g * n + k for g in chosen[start : start + per_update] for k in range(n)]
        sizes = [outcomes[number].size for number in of_update]
        places = samples.shares(sizes, len(served))
        shares.append([[of_update[place] for place in part] for part in places])
        for keys, replica, part in zip(wanted, served, shares[-1], strict=True):
            keys += [
                outcomes[number].key
                for number in part or of_update[:1]
                if outcomes[number].replica != replica
            ]
    held = exchange(held, wanted, is_leader, context.groups)

    def sample(number: int) -> TrainSample:
        rollout = held[outcomes[number].key]
        return samples.train_sample(rollout, **credited.advantages_of(number))

    updates = []
    for share in shares:
        own = share[rank] or [min(chain.from_iterable(share))]
        samples.pixels.start(outcomes[number].key[0] for number in own)  # other replicas'
        made = list(map(sample, own))
        updates.append(made if share[rank] else [without_targets(made[0])])
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
