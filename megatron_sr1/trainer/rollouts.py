"""The rollouts of a step: prompts, both passes on all replicas, rewards, refills.

In: the training set, the engine and a scorer. Out: scored rollouts, equal on every rank, and what
the engine counted. If the grader has no time or memory for a rollout, its prompt is left out as a
whole; an answer on which a library raises is wrong, and logged. Nothing that a policy samples
raises here.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial, reduce
from typing import Any

from megatron_sr1.errors import DataError, GradingLimit
from megatron_sr1.records import Example, Prompt, Reward, Rollout
from megatron_sr1.rewards.response import find_description
from megatron_sr1.rewards.score import Scorer, cross
from megatron_sr1.rollout.engine import Engine
from megatron_sr1.rollout.two_pass import RolloutHooks, roll_out
from megatron_sr1.runtime.groups import Groups, gather_objects, sum_over_ranks
from megatron_sr1.runtime.rng import request_seed
from megatron_sr1.trainer.context import Context
from megatron_sr1.trainer.objective import credit
from megatron_sr1.trainer.samples import Samples

log = logging.getLogger(__name__)
MAX_LOGGED = 3
"""Answers of a step that raised or met a limit which are logged on each replica."""
MAX_SHOWN_CHARACTERS = 200


@dataclass(frozen=True)
class Scored:
    """A rollout with its verdicts."""

    rollout: Rollout
    reward: Reward


@dataclass(frozen=True)
class Graded:
    """Rollouts after grading.

    Attributes:
        scored: rollouts with their verdicts; of each prompt all or none.
        ungraded: index of each prompt with a rollout that met a limit of the grader -> which limit.
        set_aside: rollouts of these prompts, with rewards of 0.
    """

    scored: tuple[Scored, ...] = ()
    ungraded: Mapping[int, str] = field(default_factory=dict)
    set_aside: tuple[Scored, ...] = ()

    @property
    def usable(self) -> tuple[Scored, ...]:
        """The graded rollouts; if there are none, those set aside, so that a run continues."""
        return self.scored or self.set_aside

    def with_more(self, more: Graded) -> Graded:
        """Append what was graded later."""
        ungraded = {**self.ungraded, **more.ungraded}
        return Graded(self.scored + more.scored, ungraded, self.set_aside + more.set_aside)


def roll_out_step(
    context: Context, engine: Engine, samples: Samples, scorer: Scorer
) -> tuple[list[Scored], dict[str, float]]:
    """Sample and score a step's prompts; with `filter_groups`, until enough of them teach.

    Source of the filter: DAPO's dynamic sampling (arXiv 2503.14476, section 3.2). A refill draws as
    many prompts as are missing. Every prompt drawn is consumed, kept or not, and the loader's
    cursor is saved with the step, so a resumed run draws the same.

    Returns:
        what `roll_out_prompts` does, for all prompts in the order drawn.

    Raises:
        DataError: no prompt could be used.
    """
    config, wanted = context.config, context.loader.per_step
    drawn = context.loader.next_step()
    graded, counted = roll_out_prompts(context, engine, samples, scorer, drawn)
    refills = 0
    while config.algorithm.filter_groups and refills < config.algorithm.max_refills:
        missing = wanted - len(credit([s.reward for s in graded.scored], config)[0].teaching)
        further = context.loader.more(missing, drawn)
        if not further:
            break
        refills += 1
        drawn = drawn + further
        found, more = roll_out_prompts(context, engine, samples, scorer, further)
        graded = graded.with_more(found)
        counted = {name: value + more[name] for name, value in counted.items()}
    with context.phase("sleep"):
        engine.sleep()
    counted["reward/ungraded_share"] = context.count_ungraded(graded.ungraded, len(drawn))
    if not graded.usable:
        raise DataError("no prompt of this step could be used; see the warnings above")
    if config.algorithm.filter_groups:
        counted["filter/refills"] = float(refills)
        counted["filter/drawn_prompts"] = float(len(drawn))
    return list(graded.usable), counted


def roll_out_prompts(
    context: Context, engine: Engine, samples: Samples, scorer: Scorer, indices: Sequence[int]
) -> tuple[Graded, dict[str, float]]:
    """Sample and score prompts on all replicas.

    Returns:
        the graded rollouts in the order of `indices`, equal on every rank, and engine counts.
    """
    config = context.config
    with context.phase("prompts"):
        prompts = read_prompts(context, engine, samples, indices)
    with context.phase("pass1"):
        rollouts, stats = roll_out(
            engine,
            prompts,
            config.rollout,
            RolloutHooks(
                find_description,
                samples.reading_prompt if config.reward.recipe == "vision_sr1" else None,
                partial(request_seed, config.seed, context.step),
                samples.gold_answer,
                config.reward.question_baseline,
            ),
        )
    context.meter.move("pass1", "pass2", stats.pass2_only_seconds)
    is_leader = engine.is_replica_leader  # the ranks of a replica hold the same rollouts
    if is_leader:
        context.throughput.count_rollouts(prompts, rollouts, samples.readings)
    with context.phase("reward"):
        graded = score(rollouts if is_leader else (), samples, scorer)
    with context.phase("share"):
        graded = gather_graded(graded, indices, context.groups)
        counts = {
            "rollout/response_tokens": stats.pass1_tokens,
            "rollout/reading_tokens": stats.pass2_tokens,
            "rollout/truncated": stats.truncated,
            "rollout/readings": stats.num_pass2,
            "rollout/distinct_readings": stats.num_prompts2,
            "rollout/engine_steps": stats.engine_steps,
        }
        own = {name: float(value if is_leader else 0) for name, value in counts.items()}
        counted = sum_over_ranks(context.groups, own)
    return graded, counted


def read_prompts(
    context: Context, engine: Engine, samples: Samples, indices: Sequence[int]
) -> list[Prompt]:
    """Read this replica's part of the prompts; unusable ones are skipped and counted."""
    own = indices[engine.replica :: engine.num_replicas]
    return context.read_usable(samples.prompt, own, engine.is_replica_leader)


def score(rollouts: Sequence[Rollout], samples: Samples, scorer: Scorer) -> Graded:
    """Score rollouts, all or none of a prompt, against their samples' gold answers.

    Raises:
        GradingError: the grader or the user's function is broken, or a gold answer; an answer never
            raises.
    """
    scored: list[Scored] = []
    ungraded: dict[int, str] = {}
    raised: list[str] = []
    for rollout in rollouts:
        if rollout.index in ungraded:
            continue
        example = samples.example(rollout.index)
        name = f"{example.where} rollout {rollout.sample}"
        try:
            reward = scorer.score(name, rollout, example)
        except GradingLimit as error:
            ungraded[rollout.index] = str(error)
            continue
        scored.append(Scored(rollout, reward))
        if reward.uncomparable is not None:
            shown = repr((reward.answer or "")[:MAX_SHOWN_CHARACTERS])
            raised.append(f"{name}: answer {shown}, gold {example.answer!r}: {reward.uncomparable}")
    _log_first("left out with its group", list(ungraded.values()))
    _log_first("counted as wrong, as reading or comparing it raised", raised)
    left_out = (r for r in rollouts if r.index in ungraded)
    aside = (Scored(r, scorer.ungraded(r, samples.example(r.index))) for r in left_out)
    whole = tuple(s for s in scored if s.rollout.index not in ungraded)
    return Graded(whole, ungraded, tuple(aside))


def _log_first(what: str, found: Sequence[str]) -> None:
    for text in found[:MAX_LOGGED]:
        log.warning("%s: %s", what, text)
    if len(found) > MAX_LOGGED:
        log.warning("%s: %d more in this step", what, len(found) - MAX_LOGGED)


def gather_graded(graded: Graded, order: Sequence[int], groups: Groups) -> Graded:
    """Gather what all replicas' leaders graded on every rank; collective over all ranks.

    The result is in the order of these indices of examples, samples ascending.
    """
    place = {index: number for number, index in enumerate(order)}

    def in_order(found: Iterable[Scored]) -> tuple[Scored, ...]:
        return tuple(sorted(found, key=lambda s: (place[s.rollout.index], s.rollout.sample)))

    whole = reduce(Graded.with_more, gather_objects(graded, groups.world))
    return Graded(in_order(whole.scored), whole.ungraded, in_order(whole.set_aside))


def reward_means(scored: Sequence[Scored]) -> dict[str, float]:
    """Return a step's mean rewards, and the four cells of pass 1 x pass 2 as shares.

    `reward/uncomparable` counts the rollouts on which a library raised.
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


def rollout_line(
    step: int,
    scored: Scored,
    example: Example,
    advantage: float,
    description_advantage: float | None = None,
) -> dict[str, Any]:
    """Return a line of rollouts/step_N.jsonl, with both advantages if credit is per span."""
    rollout = scored.rollout
    line = {
        "step": step,
        "index": rollout.index,
        "sample": rollout.sample,
        **texts(rollout, example),
        "advantage": advantage,
        "weight_version": rollout.weight_version,
        "reward": asdict(scored.reward),
    }
    if description_advantage is not None:
        line["description_advantage"] = description_advantage
    return line


def texts(rollout: Rollout, example: Example) -> dict[str, Any]:
    """Return the texts of a rollout, as the files of a run hold them.

    `reading` holds the answers of pass 2, or the likelihood of the gold answer.
    """
    reading = None
    if rollout.reading is not None:
        reading, scores = "\n".join(rollout.reading.texts), rollout.reading.gold_logprobs
        if scores is not None:
            reading = f"(log p of the gold answer: {sum(scores):.3f} over {len(scores)} tokens)"
    others = {"other_golds": list(example.other_answers)} if example.other_answers else {}
    return {
        "question": example.question,
        "gold": example.answer,
        **others,
        "response": rollout.completion.text,
        "description": rollout.description,
        "reading": reading,
    }
