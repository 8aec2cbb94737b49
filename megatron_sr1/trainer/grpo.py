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
from typing import Any, NamedTuple

import numpy as np

from megatron_sr1.config.run import Config
from megatron_sr1.data.packing import advantage_fields
from megatron_sr1.records import PackedBatch, Rollout, TrainSample
from megatron_sr1.rewards.answered import Key
from megatron_sr1.rewards.grading_pool import GradingPool
from megatron_sr1.rollout.engine import Engine
from megatron_sr1.runtime.groups import Groups, gather_objects
from megatron_sr1.trainer.actor import Actor, Reference
from megatron_sr1.trainer.context import Context, Evaluate
from megatron_sr1.trainer.grading import Graded, conclude, grade
from megatron_sr1.trainer.objective import Credit, grpo_loss
from megatron_sr1.trainer.recording import record
from megatron_sr1.trainer.rollouts import Drawn, Entry, exchange, roll_out_step
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
    for _ in context.steps():
        sync(context, actor, engine, again=context.step > started_at)
        agreement = canary.check(context, actor, engine) if canary else {}

        drawn, graded = roll_out_step(context, engine, samples, grading)
        entries, filtered = drawn.entries, dict[str, float]()
        if graded is not None:
            entries, filtered = chosen_entries(drawn, graded, config)
        with context.phase("pack"):
            owned = own_samples(context, samples, drawn, entries, served)
            updates = [samples.pack([each.sample for each in own], context.groups) for own in owned]
        # Without a filter, the last rollouts are graded while the actor computes.
        finish = partial(finish_grading, context, samples, grading, drawn, graded)
        with context.beside(partial(finish, owned, updates)) as later:
            updates = with_logprobs(context, actor, owned, updates, reference)
            with context.phase("reward"):
                graded, fields = later.result()
        updates = with_fields(updates, fields)
        samples.forget_pixels()  # all rows are packed by now
        measured = []
        write = partial(read_ahead_and_record, context, engine, samples, graded)
        with context.phase("update"), context.beside(write) as recorded:
            for own in owned:
                # Its rows have the only copy of their pixels, which nothing here keeps.
                temperature = config.rollout.temperature
                measured.append(update(actor, updates.pop(0), objective, temperature))
                context.throughput.count_samples("update", [each.sample for each in own])
            values = recorded.result()

        values |= {**graded.metrics, **filtered, **named(measured), **agreement}
        values["reward/ungraded"] = float(context.ungraded)
        samples.forget()
        with context.phase("prompts"):
            samples.pixels.finish()
        context.finish_step(values, actor, evaluate)


def finish_grading(
    context: Context,
    samples: Samples,
    grading: GradingPool,
    drawn: Drawn,
    graded: Graded | None,
    owned: Sequence[Sequence[Learned]],
    updates: Sequence[Sequence[PackedBatch]],
) -> tuple[Graded, list[list[Fields]]]:
    """Return a step's verdicts, and the fields with advantages of the rows of all updates.

    With filtered groups, the verdicts are there already: `graded`. Raises DataError if too many
    samples of the run are unusable, before anything is learned.
    """
    context.count_skipped()
    if graded is None:
        found = grade(drawn.own, drawn.indices, samples, grading, context.groups)
        graded = conclude(context, len(drawn.indices), *found)
    prompts = [samples.prompt(index) for index in dict.fromkeys(each.index for each in drawn.own)]
    context.throughput.count_rollouts(prompts, drawn.own, samples.readings)
    return graded, credit_fields(samples, owned, updates, graded)


def read_ahead_and_record(
    context: Context, engine: Engine, samples: Samples, graded: Graded
) -> dict[str, float]:
    """Start to read the images of this replica's next prompts, and record what is learned from."""
    if context.step + 1 < context.config.num_steps:
        samples.pixels.start(context.loader.upcoming()[engine.replica :: engine.num_replicas])
    return record(context, samples, graded)


def chosen_entries(
    drawn: Drawn, graded: Graded, config: Config
) -> tuple[list[Entry], dict[str, float]]:
    """Return the entries of the groups to learn from, and how many groups were dropped."""
    groups, counts = chosen_groups(graded.credited, config.data.prompts_per_step)
    n = config.rollout.samples_per_prompt
    keys = {graded.verdicts[group * n + k].key for group in groups for k in range(n)}
    return [entry for entry in drawn.entries if entry.key in keys], counts


def chosen_groups(credited: Credit, per_step: int) -> tuple[list[int], dict[str, float]]:
    """Return the groups with a spread of rewards, and how many were dropped.

    If there is none, the first `per_step` remain: then only the KL term moves the actor, as it
    would without the filter.
    """
    num_groups, teaching = len(credited.advantages), credited.teaching
    return teaching or list(range(min(per_step, num_groups))), {
        "filter/dropped_groups": float(num_groups - len(teaching)),
        "filter/kept_groups": float(len(teaching)),
    }


def served_replicas(groups: Groups, engine: Engine) -> list[int | None]:
    """Return for each data-parallel rank the engine replica of all its ranks, None if several."""
    found: dict[int, set[int]] = defaultdict(set)
    for rank, replica in gather_objects((groups.data.rank, engine.replica), groups.world):
        found[rank].add(replica)
    return [min(found[rank]) if len(found[rank]) == 1 else None for rank in sorted(found)]


Fields = dict[str, Any]
"""Fields of a row's `PackedBatch`, [1, T], by name."""


class Learned(NamedTuple):
    """A rollout that this data-parallel rank learns from, and its sequence."""

    rollout: Rollout
    sample: TrainSample


def own_samples(
    context: Context,
    samples: Samples,
    drawn: Drawn,
    entries: Sequence[Entry],
    served: Sequence[int | None],
) -> list[list[Learned]]:
    """Return this data-parallel rank's part of each update of the step, which has these entries.

    Collective over all ranks; `served` is as `served_replicas` returns it. A rank without a sample
    in an update has one that teaches nothing.
    """
    rank = context.groups.data.rank
    num_samples = context.config.rollout.samples_per_prompt
    per_update = num_samples * context.config.algorithm.prompts_per_update
    shares: list[list[Entry]] = []  # this rank's in each update
    idle: list[bool] = []
    wanted: list[list[Key]] = [[] for _ in served]
    for start in range(0, len(entries), per_update):
        of_update = entries[start : start + per_update]
        places = samples.shares([entry.size for entry in of_update], len(served))
        parts = [[of_update[place] for place in part or [0]] for part in places]
        for keys, replica, part in zip(wanted, served, parts, strict=True):
            keys += [entry.key for entry in part if entry.replica != replica]
        shares.append(parts[rank])
        idle.append(not places[rank])
    held = exchange(drawn, wanted, context.groups)
    samples.pixels.start(entry.key[0] for share in shares for entry in share)  # other replicas'
    updates = []
    for share, is_idle in zip(shares, idle, strict=True):
        rollouts = [held[entry.key] for entry in share]
        sequences = [drawn.sequences.get(r.key) or samples.train_sample(r) for r in rollouts]
        sequences = list(map(without_targets, sequences)) if is_idle else sequences
        updates.append(list(map(Learned, rollouts, sequences)))
    return updates


def credit_fields(
    samples: Samples,
    owned: Sequence[Sequence[Learned]],
    updates: Sequence[Sequence[PackedBatch]],
    graded: Graded,
) -> list[list[Fields]]:
    """Return the advantages in the rows of all updates; what is not graded teaches nothing."""
    numbers = {verdict.key: number for number, verdict in enumerate(graded.verdicts)}

    def advantages(rollout: Rollout) -> np.ndarray | None:
        number = numbers.get(rollout.key)
        if number is None:
            return None
        return samples.advantages(rollout, **graded.credited.advantages_of(number))

    fields = []
    for own, batches in zip(owned, updates, strict=True):
        found = [advantages(rollout) for rollout, _ in own]
        sequences = [sample for _, sample in own]
        fields.append([advantage_fields(batch, sequences, found) for batch in batches])
    return fields


def with_fields(
    updates: Sequence[Sequence[PackedBatch]], fields: Sequence[Sequence[Fields]]
) -> list[Sequence[PackedBatch]]:
    """Return the rows of updates with these fields of each."""
    return [
        [replace(batch, **found) for batch, found in zip(batches, of_rows, strict=True)]
        for batches, of_rows in zip(updates, fields, strict=True)
    ]


def with_logprobs(
    context: Context,
    actor: Actor,
    owned: Sequence[Sequence[Learned]],
    updates: list[Sequence[PackedBatch]],
    reference: Reference | None,
) -> list[Sequence[PackedBatch]]:
    """Add old and reference logprobs to the rows of all updates, before the weights change.

    `owned` are the samples in them. In the first update the policy's own logprobs are the old ones,
    which saves that pass.
    """

    def add(field: str, phase: str, first: int = 0) -> list[Sequence[PackedBatch]]:
        fields: list[list[Fields]] = []
        for own, batches in zip(owned[first:], updates[first:], strict=True):
            rows = row_logprobs(actor, batches, context.config.rollout.temperature)
            fields.append([{field: row} for row in rows])
            context.throughput.count_samples(phase, [each.sample for each in own])
        return updates[:first] + with_fields(updates[first:], fields)

    actor.restore_weights()
    if len(updates) > 1:
        with context.phase("old_logprobs"):
            updates = add("old_logprobs", "old_logprobs", first=1)
    if reference is not None:
        actor.offload("gradients")  # unless it is done: the reference takes their memory
        with context.phase("reference"), reference.in_place():
            updates = add("reference_logprobs", "reference")
    return updates
