"""The rollouts of a step: prompts, both passes on all replicas, rewards, refills.

In: the training set, the engine and what grades. Out: the verdicts, equal on every rank, and the
rollouts, which stay where they were sampled until another rank needs them. A rollout is graded as
soon as it is finished, while others are sampled. If the grader has no time or memory for one, its
prompt is left out as a whole; an answer on which a library raises is wrong, and logged. Nothing
that a policy samples raises here.
"""

from __future__ import annotations

import logging
import pickle
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

import torch.distributed as dist

from megatron_sr1.config.rollout import RolloutConfig
from megatron_sr1.data.packing import Size
from megatron_sr1.errors import DataError, GradingLimit
from megatron_sr1.records import Example, Prompt, Reward, Rollout, texts
from megatron_sr1.rewards.answered import Finished, Key
from megatron_sr1.rewards.grading_pool import GradingPool
from megatron_sr1.rewards.score import cross
from megatron_sr1.rollout.engine import Engine
from megatron_sr1.rollout.readings import RolloutHooks
from megatron_sr1.rollout.two_pass import roll_out
from megatron_sr1.runtime.groups import Group, Groups, gather_objects
from megatron_sr1.runtime.rng import request_seed
from megatron_sr1.trainer.context import Context
from megatron_sr1.trainer.objective import Credit, credit
from megatron_sr1.trainer.samples import Samples

log = logging.getLogger(__name__)
MAX_LOGGED = 3
"""Answers of a step that raised or met a limit which are logged on each replica."""
MAX_SHOWN_CHARACTERS = 200
MEANS_BY_SET = ("reward/accuracy", "reward/self_reward")
"""Means of a step that each set of `data.mixture` has too, as `NAME/SET`."""


@dataclass(frozen=True)
class Scored:
    """A rollout with its verdicts.

    `limit` says which limit of the grader a rollout of the same prompt met, if one did. Then the
    prompt is left out as a whole, and the rewards are 0.
    """

    rollout: Rollout
    reward: Reward
    limit: str | None = None

    @property
    def key(self) -> Key:
        """What names the rollout in a step."""
        return self.rollout.key


@dataclass(frozen=True)
class Entry:
    """What every rank knows of a rollout: the replica that has it, and its sequence's size.

    `home` of the size is the data-parallel rank of the replica's leader.
    """

    key: Key
    replica: int
    size: Size


@dataclass(frozen=True)
class Verdict:
    """What every rank knows of the verdicts on a rollout: those that advantages depend on.

    The other fields of `reward` are None; `limit` as in `Scored`.
    """

    key: Key
    reward: Reward
    limit: str | None


Judged = TypeVar("Judged", Scored, Verdict)


@dataclass(frozen=True)
class Drawn:
    """Rollouts of prompts that were drawn.

    Attributes:
        indices: of the prompts, in the order drawn, usable or not.
        entries: of all rollouts in that order, equal on every rank.
        held: the rollouts that this rank has: those of its replica.
        is_leader: whether this rank speaks for its replica, whose ranks hold the same.
    """

    indices: list[int]
    entries: list[Entry]
    held: dict[Key, Rollout]
    is_leader: bool

    def __add__(self, other: Drawn) -> Drawn:
        """Return both; those drawn first come first."""
        indices, entries = self.indices + other.indices, self.entries + other.entries
        return Drawn(indices, entries, self.held | other.held, self.is_leader)

    @property
    def own(self) -> list[Rollout]:
        """What this rank has of all rollouts, each of which one rank has."""
        return list(self.held.values()) if self.is_leader else []


@dataclass(frozen=True)
class Graded:
    """A step's verdicts, equal on every rank.

    Attributes:
        verdicts: on the rollouts of usable prompts, in the order drawn.
        own: of this rank as its replica's leader, in full; none on the others.
        credited: advantages, in the order of the verdicts.
        metrics: of the step.
    """

    verdicts: list[Verdict]
    own: Sequence[Scored]
    credited: Credit
    metrics: dict[str, float]


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
    if config.algorithm.filter_groups:
        with context.phase("reward"):
            verdicts, own = grade(context, samples, grading, drawn)
        while refills < config.algorithm.max_refills:
            rewards = [each.reward for each in verdicts if each.limit is None]
            missing = wanted - len(credit(rewards, config)[0].teaching)
            further = context.loader.more(missing, drawn.indices)
            if not further:
                break
            refills += 1
            found = roll_out_prompts(context, engine, samples, further, grading)
            with context.phase("reward"):
                more, more_own = grade(context, samples, grading, found)
            drawn, verdicts, own = drawn + found, verdicts + more, own + more_own
        graded = conclude(context, drawn, verdicts, own)
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
    """Sample prompts on all replicas, and have each rollout graded as soon as it is finished."""
    config, is_leader = context.config, engine.is_replica_leader
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
                finished=grade_early(samples, grading, config.rollout) if is_leader else None,
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
    if is_leader:
        context.throughput.count_rollouts(prompts, rollouts, samples.readings)
    with context.phase("wait"):  # for the slowest replica
        dist.barrier(group=context.groups.world.process_group)
    with context.phase("share"):
        own, home = [], context.groups.data.rank
        for each in rollouts if is_leader else ():
            size = samples.size(each, home)
            own.append((*each.key, engine.replica, size.tokens, size.patches, size.shared, home))
        entries = []
        for row in gather_in_order(own, indices, context.groups.world):
            index, sample, replica, tokens, patches, shared, home = row
            size = Size(tokens, patches, index, shared, home)
            entries.append(Entry((index, sample), replica, size))
    held = {rollout.key: rollout for rollout in rollouts}
    return Drawn(list(indices), entries, held, is_leader)


def grade(
    context: Context, samples: Samples, grading: GradingPool, drawn: Drawn
) -> tuple[list[Verdict], list[Scored]]:
    """Return the verdicts on rollouts in the order drawn, and this rank's own in full.

    Collective over all ranks; may run beside other work.
    """
    scored, own = score(drawn.own, samples, grading), []
    for each in scored:
        r = each.reward
        values = r.accuracy, r.format, r.self_reward, r.leak, r.total
        own.append((*each.key, each.limit, *values))
    everyone = []
    for row in gather_in_order(own, drawn.indices, context.groups.background):
        index, sample, limit, accuracy, has_form, self_reward, leak, total = row
        reward = Reward(accuracy, has_form, self_reward, leak, total, None, None)
        everyone.append(Verdict((index, sample), reward, limit))
    return everyone, scored


def conclude(
    context: Context, drawn: Drawn, verdicts: Sequence[Verdict], own: Sequence[Scored]
) -> Graded:
    """Leave out prompts that could not be graded, and compute the advantages of the others."""
    usable, limits = without_ungraded(verdicts)
    share = context.count_ungraded(limits, len(drawn.indices))
    credited, spread = credit([each.reward for each in usable], context.config)
    return Graded(usable, own, credited, {"reward/ungraded_share": share, **spread})


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
    """Read this replica's part of the prompts; unusable ones are skipped and counted."""
    own = indices[engine.replica :: engine.num_replicas]
    samples.pixels.start(own)
    samples.prepare(own)
    return context.read_usable(samples.prompt, own, engine.is_replica_leader)


class Grading(Protocol):
    """What grades rollouts: a `GradingPool`, or a `Scorer` in this process."""

    def results(self, finished: Sequence[Finished]) -> list[Reward | GradingLimit]:
        """Return the rewards of rollouts, in order."""

    def ungraded(self, rollout: Rollout, example: Example) -> Reward:
        """Return zero rewards for a rollout that could not be graded."""


def grade_early(
    samples: Samples, grading: GradingPool, rollout: RolloutConfig
) -> Callable[[Sequence[Rollout]], None]:
    """Return what has rollouts graded while the engine samples others."""

    def finished(rollouts: Sequence[Rollout]) -> None:
        named = (to_grade(each, samples) for each in rollouts)  # by a thread of its own
        grading.submit(named, rollout.samples_per_prompt)

    return finished


def to_grade(rollout: Rollout, samples: Samples) -> Finished:
    """Return a rollout with its example and its name for messages."""
    example = samples.example(rollout.index)
    name = f"{example.where} rollout {rollout.sample}"
    return Finished(name, rollout, example, lambda: samples.reader.image_files(rollout.index))


def score(rollouts: Sequence[Rollout], samples: Samples, grading: Grading) -> list[Scored]:
    """Return rollouts with the verdicts on them; those that were not submitted are graded now.

    Raises:
        GradingError: the grader or the user's function is broken, or a gold answer; an answer never
            raises.
    """
    scored: list[Scored] = []
    limits: dict[int, str] = {}
    raised: list[str] = []
    finished = [to_grade(rollout, samples) for rollout in rollouts]
    for each, reward in zip(finished, grading.results(finished), strict=True):
        rollout, gold = each.rollout, each.example.answer
        if rollout.index in limits:
            continue
        if isinstance(reward, GradingLimit):
            limits[rollout.index] = str(reward)
            continue
        scored.append(Scored(rollout, reward))
        if reward.uncomparable is not None:
            shown = repr((reward.answer or "")[:MAX_SHOWN_CHARACTERS])
            raised.append(f"{each.name}: answer {shown}, gold {gold!r}: {reward.uncomparable}")
    _log_first("left out with its group", list(limits.values()))
    _log_first("counted as wrong, as reading or comparing it raised", raised)
    scored = [s for s in scored if s.rollout.index not in limits]
    for rollout in rollouts:
        if rollout.index in limits:
            nothing = grading.ungraded(rollout, samples.example(rollout.index))
            scored.append(Scored(rollout, nothing, limits[rollout.index]))
    return scored


def _log_first(what: str, found: Sequence[str]) -> None:
    for text in found[:MAX_LOGGED]:
        log.warning("%s: %s", what, text)
    if len(found) > MAX_LOGGED:
        log.warning("%s: %d more in this step", what, len(found) - MAX_LOGGED)


def gather_rollouts(own: Sequence[Rollout], order: Sequence[int], groups: Groups) -> list[Rollout]:
    """Gather the rollouts of all replicas' leaders on every rank; collective over all ranks.

    The result is in the order of these indices of examples, samples ascending.
    """
    place = {index: number for number, index in enumerate(order)}
    everyone = [rollout for part in gather_objects(own, groups.world) for rollout in part]
    return sorted(everyone, key=lambda rollout: (place[rollout.index], rollout.sample))


def gather_in_order(
    own: Sequence[tuple[Any, ...]], order: Sequence[int], group: Group
) -> list[tuple[Any, ...]]:
    """Gather what all replicas' leaders have on every rank; `group` is a group of all ranks.

    Tuples begin with the index and the sample of a rollout; plain ones pickle fast. The result is
    in the order of these indices, samples ascending.
    """
    place = {index: number for number, index in enumerate(order)}
    everyone = gather_objects(list(own), group)
    together = [each for part in everyone for each in part]
    return sorted(together, key=lambda each: (place[each[0]], each[1]))


def without_ungraded(scored: Sequence[Judged]) -> tuple[list[Judged], dict[int, str]]:
    """Return what was graded, and by index the limit that each prompt left out met.

    If nothing was graded, what was left out is returned, so that a run continues.
    """
    limits = {each.key[0]: each.limit for each in scored if each.limit is not None}
    return [each for each in scored if each.limit is None] or list(scored), limits


def reward_means(scored: Sequence[Scored]) -> dict[str, float]:
    """Return a step's mean rewards, and the four cells of pass 1 x pass 2 as shares.

    `reward/uncomparable` counts the rollouts on which a library raised. The metrics of a user's
    function are means over the responses for which it returned them.
    """
    rewards = [item.reward for item in scored]
    count = max(len(rewards), 1)
    means = {
        "reward/accuracy": sum(r.accuracy for r in rewards) / count,
        "reward/format": sum(r.format for r in rewards) / count,
        "reward/total": sum(r.total for r in rewards) / count,
        "reward/leak_rate": sum(r.leak for r in rewards) / count,
        "reward/uncomparable": float(sum(r.uncomparable is not None for r in rewards)),
    }
    penalties = [r.overlong for r in rewards if r.overlong is not None]
    if penalties:
        means["reward/overlong"] = sum(penalties) / len(penalties)
    for name in dict.fromkeys(name for r in rewards for name in r.metrics):
        values = [r.metrics[name] for r in rewards if name in r.metrics]
        means[f"reward/{name}"] = sum(values) / len(values)
    judged = [r.self_reward for r in rewards if r.self_reward is not None]
    if judged:
        means["reward/self_reward"] = sum(judged) / len(judged)
        cells = cross((r.accuracy, r.self_reward) for r in rewards)
        for right, first in ((True, "right"), (False, "wrong")):
            for read, second in ((True, "right"), (False, "wrong")):
                share = cells[right, read] / len(judged)
                means[f"table/pass1_{first}_pass2_{second}"] = share
        means["reward/shortcut_rate"] = means["table/pass1_right_pass2_wrong"]
    return means


def set_means(scored: Sequence[Scored], set_of: Callable[[int], str]) -> dict[str, float]:
    """Return mean accuracy and self-reward of each set of `data.mixture` with rollouts in a step.

    `set_of` returns the name of a sample's set, "" without a mixture.
    """
    by_set: dict[str, list[Scored]] = defaultdict(list)
    for item in scored:
        by_set[set_of(item.rollout.index)].append(item)
    by_set.pop("", None)
    means = {name: reward_means(items) for name, items in by_set.items()}
    return {
        f"{metric}/{name}": found[metric]
        for metric in MEANS_BY_SET
        for name, found in sorted(means.items())
        if metric in found
    }


def rollout_line(
    step: int,
    scored: Scored,
    example: Example,
    advantages: Mapping[str, float],
    set_name: str = "",
) -> dict[str, Any]:
    """Return a line of rollouts/step_N.jsonl, with both advantages if credit is per span.

    It has the name of the sample's set if there is a `data.mixture`.
    """
    rollout = scored.rollout
    return {
        "step": step,
        **({"set": set_name} if set_name else {}),
        "index": rollout.index,
        "sample": rollout.sample,
        **texts(rollout, example),
        **advantages,
        "weight_version": rollout.weight_version,
        "reward": dict(vars(scored.reward)),
    }
