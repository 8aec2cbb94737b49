"""The verdicts on a step's rollouts: grading while others are sampled, or the actor computes.

In: finished rollouts, and what grades them. Out: verdicts and advantages, equal on every rank. If
the grader has no time or memory for a rollout, its prompt is left out as a whole; an answer on
which a library raises is wrong, and logged. Nothing that a policy samples raises here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from megatron_sr1.config.rollout import RolloutConfig
from megatron_sr1.errors import GradingLimit
from megatron_sr1.records import Example, Reward, Rollout
from megatron_sr1.rewards.answered import Finished, Key
from megatron_sr1.rewards.grading_pool import GradingPool
from megatron_sr1.runtime.groups import Group, Groups, gather_objects
from megatron_sr1.trainer.context import Context
from megatron_sr1.trainer.objective import Credit, credit
from megatron_sr1.trainer.samples import Samples

log = logging.getLogger(__name__)
MAX_LOGGED = 3
"""Answers of a step that raised or met a limit which are logged on each replica."""
MAX_SHOWN_CHARACTERS = 200


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
class Verdict:
    """What every rank knows of the verdicts on a rollout: those that advantages depend on.

    The other fields of `reward` are None; `limit` as in `Scored`.
    """

    key: Key
    reward: Reward
    limit: str | None


Judged = TypeVar("Judged", Scored, Verdict)
Row = TypeVar("Row", bound=Sequence[Any])


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


def grade(
    rollouts: Sequence[Rollout],
    order: Sequence[int],
    samples: Samples,
    grading: GradingPool,
    groups: Groups,
) -> tuple[list[Verdict], list[Scored]]:
    """Return the verdicts on all ranks' rollouts, and on this rank's own in full.

    Collective over all ranks; may run beside other work. The verdicts are in the order of these
    indices of examples, samples ascending.
    """
    scored, own = score(rollouts, samples, grading), []
    for each in scored:
        r = each.reward
        values = r.accuracy, r.format, r.self_reward, r.leak, r.total
        own.append((*each.key, each.limit, *values))
    everyone = []
    for row in gather_in_order(own, order, groups.background):
        index, sample, limit, accuracy, has_form, self_reward, leak, total = row
        reward = Reward(accuracy, has_form, self_reward, leak, total, None, None)
        everyone.append(Verdict((index, sample), reward, limit))
    return everyone, scored


def conclude(
    context: Context, num_drawn: int, verdicts: Sequence[Verdict], own: Sequence[Scored]
) -> Graded:
    """Leave out prompts that could not be graded, and compute the advantages of the others.

    `num_drawn` is the number of the step's prompts.
    """
    usable, limits = without_ungraded(verdicts)
    share = context.count_ungraded(limits, num_drawn)
    credited, spread = credit([each.reward for each in usable], context.config)
    return Graded(usable, own, credited, {"reward/ungraded_share": share, **spread})


def gather_in_order(
    own: Sequence[tuple[Any, ...]], order: Sequence[int], group: Group
) -> list[tuple[Any, ...]]:
    """Gather what all replicas' leaders have on every rank; `group` is a group of all ranks.

    Plain tuples pickle fast. They, and their order, are as `in_order` says.
    """
    return in_order((row for part in gather_objects(list(own), group) for row in part), order)


def in_order(rows: Iterable[Row], order: Sequence[int]) -> list[Row]:
    """Return rows, which begin with index and sample, in the order of these indices.

    The samples of an index are ascending.
    """
    place = {index: number for number, index in enumerate(order)}
    return sorted(rows, key=lambda row: (place[row[0]], row[1]))


def without_ungraded(scored: Sequence[Judged]) -> tuple[list[Judged], dict[int, str]]:
    """Return what was graded, and by index the limit that each prompt left out met.

    If nothing was graded, what was left out is returned, so that a run continues.
    """
    limits = {each.key[0]: each.limit for each in scored if each.limit is not None}
    return [each for each in scored if each.limit is None] or list(scored), limits
