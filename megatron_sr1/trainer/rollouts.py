"""The rollouts of a step: prompts, both passes on all replicas, refills.

In: the training set, the engine and what grades. Out: the lengths of all rollouts, equal on every
rank, and the rollouts, which stay where they were sampled until another rank needs them. A rollout
is graded as soon as it is finished, while others are sampled.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from megatron_sr1.config.rollout import RolloutConfig
from megatron_sr1.data.packing import Size
from megatron_sr1.errors import DataError
from megatron_sr1.records import Prompt, Rollout, TrainSample
from megatron_sr1.rewards.answered import Key
from megatron_sr1.rewards.grading_pool import GradingPool
from megatron_sr1.rollout.engine import Engine
from megatron_sr1.rollout.readings import RolloutHooks
from megatron_sr1.rollout.two_pass import roll_out
from megatron_sr1.runtime.groups import Groups, gather_objects, gather_rows
from megatron_sr1.runtime.rng import request_seed
from megatron_sr1.trainer.context import Context
from megatron_sr1.trainer.grading import (
    Graded,
    Scored,
    Verdict,
    conclude,
    grade,
    grade_early,
    in_order,
)
from megatron_sr1.trainer.objective import credit
from megatron_sr1.trainer.samples import Samples


@dataclass(frozen=True)
class Entry:
    """What every rank knows of a rollout: the replica that has it, and its sequence's size.

    `home` of the size is the data-parallel rank of the replica's leader.
    """

    key: Key
    replica: int
    size: Size


@dataclass(frozen=True)
class Drawn:
    """Rollouts of prompts that were drawn.

    Attributes:
        indices: of the prompts, in the order drawn, usable or not.
        entries: of all rollouts in that order, equal on every rank.
        held: the rollouts that this rank has: those of its replica.
        sequences: the same as sequences to train on.
        is_leader: whether this rank speaks for its replica, whose ranks hold the same.
    """

    indices: list[int]
    entries: list[Entry]
    held: dict[Key, Rollout]
    sequences: dict[Key, TrainSample]
    is_leader: bool

    def __add__(self, other: Drawn) -> Drawn:
        """Return both; those drawn first come first."""
        indices, entries = self.indices + other.indices, self.entries + other.entries
        held, sequences = self.held | other.held, self.sequences | other.sequences
        return Drawn(indices, entries, held, sequences, self.is_leader)

    @property
    def own(self) -> list[Rollout]:
        """What this rank has of all rollouts, each of which one rank has."""
        return list(self.held.values()) if self.is_leader else []


def roll_out_step(
    context: Context, engine: Engine, samples: Samples, grading: GradingPool
) -> tuple[Drawn, Graded | None]:
    """Sample a step's prompts; with `filter_groups`, grade them until enough teach.

    Source of the filter: DAPO's dynamic sampling (arXiv 2503.14476, section 3.2). A refill draws as
    many prompts as are missing. Every prompt drawn is consumed, kept or not, and the loader's
    cursor is saved with the step, so a resumed run draws the same.

    Returns:
        the rollouts, and the verdicts on them if they decide what is learned from; otherwise the
        last ones are reached while the actor computes.

    Raises:
        DataError: no prompt could be used.
    """
    config, wanted = context.config, context.loader.per_step
    drawn = roll_out_prompts(context, engine, samples, context.loader.next_step(), grading)
    graded, refills = None, 0

    def verdicts_on(part: Drawn) -> tuple[list[Verdict], list[Scored]]:
        with context.phase("reward"):
            return grade(part.own, part.indices, samples, grading, context.groups)

    if config.algorithm.filter_groups:
        verdicts, own = verdicts_on(drawn)
        while refills < config.algorithm.max_refills:
            rewards = [each.reward for each in verdicts if each.limit is None]
            missing = wanted - len(credit(rewards, config)[0].teaching)
            further = context.loader.more(missing, drawn.indices)
            if not further:
                break
            refills += 1
            found = roll_out_prompts(context, engine, samples, further, grading)
            more, more_own = verdicts_on(found)
            drawn, verdicts, own = drawn + found, verdicts + more, own + more_own
        graded = conclude(context, len(drawn.indices), verdicts, own)
        graded.metrics["filter/refills"] = float(refills)
        graded.metrics["filter/drawn_prompts"] = float(len(drawn.indices))
    with context.phase("sleep"):
        engine.sleep()
    if not drawn.entries:
        raise DataError("no prompt of this step could be used; see the warnings above")
    return drawn, graded


def roll_out_prompts(
    context: Context,
    engine: Engine,
    samples: Samples,
    indices: Sequence[int],
    grading: GradingPool,
) -> Drawn:
    """Sample prompts on all replicas; a rollout's `follow_up` begins as soon as it is finished."""
    config, is_leader = context.config, engine.is_replica_leader
    sequences: dict[Key, TrainSample] = {}
    with context.phase("prompts"):
        prompts = read_prompts(context, engine, samples, indices)
    with context.phase("pass1"):
        rollouts, stats = roll_out(
            engine,
            prompts,
            config.rollout,
            RolloutHooks(
                samples.find_description,
                samples.reading_prompts if config.reward.recipe == "vision_sr1" else None,
                partial(request_seed, config.seed, context.step),
                samples.gold_answer,
                config.reward.question_baseline,
                reading_messages=samples.reading_messages,
                reader=context.reader(is_leader),
                # The ranks of a replica hold the same rollouts; its leader has them graded.
                finished=follow_up(
                    samples, grading if is_leader else None, config.rollout, sequences
                ),
            ),
        )
    context.meter.move("pass1", "pass2", stats.pass2_only_seconds)
    counts = {
        "rollout/response_tokens": stats.pass1_tokens,
        "rollout/reading_tokens": stats.pass2_tokens,
        "rollout/truncated": stats.truncated,
        "rollout/readings": stats.num_pass2,
        "rollout/distinct_readings": stats.num_prompts2,
        "rollout/engine_steps": stats.engine_steps,
    }
    context.count({name: float(value * is_leader) for name, value in counts.items()})
    with context.phase("share"):
        own: list[tuple[Any, ...]] = []
        for each in rollouts if is_leader else ():
            size = samples.size(each, home=context.groups.data.rank)
            own.append((*each.key, engine.replica, *size))
    with context.phase("wait"):  # for the slowest replica
        most = len(indices[:: engine.num_replicas]) * config.rollout.samples_per_prompt
        rows = gather_rows(own, (most, len(Size._fields) + 3), context.groups.background)
    with context.phase("share"):
        entries = [
            Entry((index, sample), replica, Size(*size))
            for index, sample, replica, *size in in_order(rows, indices)
        ]
    held = {rollout.key: rollout for rollout in rollouts}
    return Drawn(list(indices), entries, held, sequences, is_leader)


def follow_up(
    samples: Samples,
    grading: GradingPool | None,
    rollout: RolloutConfig,
    sequences: dict[Key, TrainSample],
) -> Callable[[Sequence[Rollout]], None]:
    """Return a function that prepares finished rollouts while the engine samples others.

    It has them graded, if there is a pool, and puts their sequences to train on into `sequences`.
    """
    have_graded = grade_early(samples, grading, rollout) if grading else None

    def finished(rollouts: Sequence[Rollout]) -> None:
        if have_graded is not None:
            have_graded(rollouts)
        sequences.update((each.key, samples.train_sample(each)) for each in rollouts)

    return finished


def exchange(drawn: Drawn, wanted: Sequence[Sequence[Key]], groups: Groups) -> dict[Key, Rollout]:
    """Return what this rank holds, and the rollouts that its data-parallel rank wants.

    Collective over all ranks. `wanted` are those that some rank of each data-parallel rank lacks,
    the same on all ranks. A rank unpickles what is its own alone.
    """
    held = drawn.held
    if not any(wanted):
        return held
    sent: dict[int, bytes] = {}
    for rank, keys in enumerate(wanted if drawn.is_leader else ()):
        sent[rank] = pickle.dumps([held[key] for key in keys if key in held])
    parts = (part[groups.data.rank] for part in gather_objects(sent, groups.world) if part)
    arrived = (rollout for part in parts for rollout in pickle.loads(part))
    return held | {rollout.key: rollout for rollout in arrived}


def read_prompts(
    context: Context, engine: Engine, samples: Samples, indices: Sequence[int]
) -> list[Prompt]:
    """Read this replica's part of the prompts, without unusable ones: `Context.count_skipped`."""
    own = indices[engine.replica :: engine.num_replicas]
    samples.pixels.start(own)
    samples.prepare(own)
    return context.read_usable(samples.prompt, own, engine.is_replica_leader)
