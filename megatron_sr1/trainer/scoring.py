"""Where rollouts meet rewards, for training and evaluation alike.

In: rollouts of this engine replica. Out: scored rollouts of all replicas on every rank, the lines
that are saved, and the rates of pass 1 x pass 2 (METHOD: language-shortcut rate). A prompt with a
rollout that the grader has no time or memory for is left out whole. An answer on which a library
raised is wrong, and named. Nothing that a policy samples raises here.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from megatron_sr1.errors import GradingLimit
from megatron_sr1.records import RIGHT_FROM, Example, Reward, Rollout
from megatron_sr1.rewards.score import Scorer
from megatron_sr1.runtime.collectives import gather_objects
from megatron_sr1.runtime.groups import Groups
from megatron_sr1.trainer.samples import Samples

log = logging.getLogger(__name__)

MAX_NAMED = 3
"""Of answers that raised or met a limit, so many are named in the log of a step on each replica."""
MAX_SHOWN_CHARACTERS = 200


@dataclass(frozen=True)
class Scored:
    """A rollout with its verdicts."""

    rollout: Rollout
    reward: Reward


@dataclass(frozen=True)
class Graded:
    """What the grader made of some rollouts.

    Attributes:
        scored: rollouts with their verdicts; of each prompt all or none.
        ungraded: index of each prompt left out, as one of its rollouts met a limit -> which one.
        set_aside: rollouts of those prompts, with verdicts that pay nothing.
    """

    scored: tuple[Scored, ...] = ()
    ungraded: Mapping[int, str] = field(default_factory=dict)
    set_aside: tuple[Scored, ...] = ()

    @property
    def usable(self) -> tuple[Scored, ...]:
        """What was graded; where nothing was, the rollouts set aside, so that a run continues."""
        return self.scored or self.set_aside

    def with_more(self, more: Graded) -> Graded:
        """This and what was graded after it."""
        ungraded = {**self.ungraded, **more.ungraded}
        return Graded(self.scored + more.scored, ungraded, self.set_aside + more.set_aside)


def score(rollouts: Iterable[Rollout], samples: Samples, scorer: Scorer) -> Graded:
    """Score rollouts against their samples' gold answers.

    Args:
        rollouts: all or none of a prompt.
        samples: where their gold answers are.
        scorer: of the recipe.

    Raises:
        GradingError: the grader is broken, or a gold answer, or the user's function; no answer is.
    """
    given = list(rollouts)
    scored: list[Scored] = []
    ungraded: dict[int, str] = {}
    raised: list[str] = []
    for rollout in given:
        if rollout.index in ungraded:
            continue
        example = samples.example(rollout.index)
        name = f"{example.shard} sample {example.key} rollout {rollout.sample}"
        try:
            reward = scorer.score(name, rollout, example)
        except GradingLimit as error:
            ungraded[rollout.index] = str(error)
            continue
        scored.append(Scored(rollout, reward))
        if reward.uncomparable is not None:
            shown = repr((reward.answer or "")[:MAX_SHOWN_CHARACTERS])
            raised.append(f"{name}: answer {shown}, gold {example.answer!r}: {reward.uncomparable}")
    _name("left out with its group", list(ungraded.values()))
    _name("counted as wrong, as reading or comparing it raised", raised)
    left_out = (r for r in given if r.index in ungraded)
    aside = (Scored(r, scorer.ungraded(r, samples.example(r.index))) for r in left_out)
    whole = tuple(s for s in scored if s.rollout.index not in ungraded)
    return Graded(whole, ungraded, tuple(aside))


def _name(what: str, found: Sequence[str]) -> None:
    """Warn of the first few."""
    for text in found[:MAX_NAMED]:
        log.warning("%s: %s", what, text)
    if len(found) > MAX_NAMED:
        log.warning("%s: %d more in this step", what, len(found) - MAX_NAMED)


def share(graded: Graded, order: Sequence[int], speaks: bool, groups: Groups) -> Graded:
    """Give what all replicas graded to every rank; collective over all ranks.

    Args:
        graded: of this replica.
        order: indices of the step's examples; the result follows it, samples ascending.
        speaks: True on one rank of each replica.
        groups: the layout.
    """
    place = {index: number for number, index in enumerate(order)}
    parts = gather_objects(graded if speaks else Graded(), groups.world)

    def in_order(found: Iterable[Scored]) -> tuple[Scored, ...]:
        return tuple(sorted(found, key=lambda s: (place[s.rollout.index], s.rollout.sample)))

    return Graded(
        in_order(item for part in parts for item in part.scored),
        {index: text for part in parts for index, text in part.ungraded.items()},
        in_order(item for part in parts for item in part.set_aside),
    )


def rollout_line(step: int, scored: Scored, example: Example, advantage: float) -> dict[str, Any]:
    """A line of rollouts/step_N.jsonl."""
    rollout = scored.rollout
    return {
        "step": step,
        "index": rollout.index,
        "sample": rollout.sample,
        "question": example.question,
        "gold": example.answer,
        **_other_golds(example),
        "response": rollout.completion.text,
        "description": rollout.description,
        "reading": read_text(rollout),
        "advantage": advantage,
        "weight_version": rollout.weight_version,
        "reward": asdict(scored.reward),
    }


def read_text(rollout: Rollout) -> str | None:
    """Pass 2 as the report shows it: one answer after the other, or the gold one's likelihood."""
    if rollout.reading is None:
        return None
    scores = rollout.reading.gold_logprobs
    if scores is not None:
        return f"(log p of the gold answer: {sum(scores):.3f} over {len(scores)} tokens)"
    return "\n".join(rollout.reading.texts)


def is_exact(description: str, expected: Sequence[Any]) -> bool:
    """Return True if a description names the expected items, in order and no others.

    Args:
        description: text of the span.
        expected: words or digits; where all are digits, whatever else the text has is not compared.
    """
    items = [str(item).lower() for item in expected]
    pattern = "[0-9]" if all(re.fullmatch("[0-9]", item) for item in items) else r"\w+"
    return re.findall(pattern, description.lower()) == items


def evaluation_line(scored: Scored, example: Example) -> dict[str, Any]:
    """A line of an evaluation file: what was said and the four verdicts, 0, 1 or null.

    Accuracy and self-reward are what a function of the user's gave, where there is one.
    """
    rollout, reward = scored.rollout, scored.reward
    expected = example.metadata.get("expected_description", example.metadata.get("digits"))
    exact = None if expected is None else int(is_exact(rollout.description or "", expected))
    shortcut = None
    if reward.self_reward is not None:
        shortcut = int(reward.accuracy >= RIGHT_FROM > reward.self_reward)
    return {
        "index": rollout.index,
        "question": example.question,
        "gold": example.answer,
        **_other_golds(example),
        "response": rollout.completion.text,
        "description": rollout.description,
        "reading": read_text(rollout),
        "accuracy": _short(reward.accuracy),
        "self_reward": None if reward.self_reward is None else _short(reward.self_reward),
        "description_exact": exact,
        "shortcut": shortcut,
    }


def _other_golds(example: Example) -> dict[str, list[str]]:
    """Further gold answers, where there are several."""
    return {"other_golds": list(example.other_answers)} if example.other_answers else {}


def _short(verdict: float) -> float:
    """0 and 1 as whole numbers."""
    return int(verdict) if verdict in (0.0, 1.0) else verdict


VERDICTS = {
    "accuracy": "accuracy",
    "self_reward": "self_reward",
    "description_exact": "description_exact",
    "shortcut": "shortcut_rate",
}
"""Verdict of an evaluation line -> name of its rate."""


def rates(lines: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Mean over the lines that have the verdict; a verdict that none has is left out."""
    found = {}
    for verdict, name in VERDICTS.items():
        values = [line[verdict] for line in lines if line[verdict] is not None]
        if values:
            found[name] = sum(values) / len(values)
    return found


def reward_means(scored: Sequence[Scored]) -> dict[str, float]:
    """Mean rewards of a step, and the four cells of pass 1 x pass 2 as shares of its samples.

    `reward/uncomparable` counts the rollouts on which a library raised.
    A self-reward in between counts as right from 0.5 on.
    """
    rewards = [s.reward for s in scored]
    count = max(len(rewards), 1)
    means = {
        "reward/accuracy": sum(r.accuracy for r in rewards) / count,
        "reward/format": sum(r.format for r in rewards) / count,
        "reward/total": sum(r.total for r in rewards) / count,
        "reward/leak_rate": sum(r.leak for r in rewards) / count,
        "reward/uncomparable": float(sum(r.uncomparable is not None for r in rewards)),
    }
    judged = [r for r in rewards if r.self_reward is not None]
    if judged:
        means["reward/self_reward"] = sum(r.self_reward or 0.0 for r in judged) / len(judged)
        cells = [(r.accuracy >= RIGHT_FROM, (r.self_reward or 0.0) >= RIGHT_FROM) for r in judged]
        for right, said in ((True, "right"), (False, "wrong")):
            for read, heard in ((True, "right"), (False, "wrong")):
                cell = cells.count((right, read))
                means[f"table/pass1_{said}_pass2_{heard}"] = cell / len(judged)
        means["reward/shortcut_rate"] = means["table/pass1_right_pass2_wrong"]
    return means
