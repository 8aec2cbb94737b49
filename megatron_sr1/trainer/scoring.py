"""Where rollouts meet rewards, for training and evaluation alike.

In: rollouts of this engine replica. Out: scored rollouts of all replicas on every rank, the lines
that are saved, and the rates of pass 1 x pass 2 (METHOD: language-shortcut rate).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megatron_sr1.data.digits import described_digits
from megatron_sr1.records import Example, Reward, Rollout
from megatron_sr1.rewards.score import Scorer
from megatron_sr1.runtime.groups import Groups, gather_objects
from megatron_sr1.trainer.samples import Samples


@dataclass(frozen=True)
class Scored:
    """A rollout with its verdicts."""

    rollout: Rollout
    reward: Reward


def score(rollouts: Iterable[Rollout], samples: Samples, scorer: Scorer) -> list[Scored]:
    """Score rollouts against their samples' gold answers."""
    scored = []
    for rollout in rollouts:
        example = samples.example(rollout.index)
        reward = scorer.score(
            sample_name=f"{example.shard} sample {example.key}",
            response_text=rollout.completion.text,
            gold=example.answer or "",
            question=example.question,
            description=rollout.description,
            reading_text=rollout.reading.text if rollout.reading else None,
            has_image=example.num_images > 0,
        )
        scored.append(Scored(rollout, reward))
    return scored


def share(
    scored: Sequence[Scored], order: Sequence[int], speaks: bool, groups: Groups
) -> list[Scored]:
    """Give all replicas' scored rollouts to every rank.

    Args:
        scored: of this replica.
        order: indices of the step's examples; the result follows it, samples ascending.
        speaks: True on one rank of each replica.
        groups: the layout.
    """
    place = {index: number for number, index in enumerate(order)}
    parts = gather_objects(list(scored) if speaks else [], groups.world)
    everyone = [item for part in parts for item in part]
    return sorted(everyone, key=lambda s: (place[s.rollout.index], s.rollout.sample))


def rollout_line(step: int, scored: Scored, example: Example, advantage: float) -> dict[str, Any]:
    """A line of rollouts/step_N.jsonl."""
    rollout = scored.rollout
    return {
        "step": step,
        "index": rollout.index,
        "sample": rollout.sample,
        "question": example.question,
        "gold": example.answer,
        "response": rollout.completion.text,
        "description": rollout.description,
        "reading": rollout.reading.text if rollout.reading else None,
        "advantage": advantage,
        "weight_version": rollout.weight_version,
        "reward": asdict(scored.reward),
    }


def evaluation_line(scored: Scored, example: Example) -> dict[str, Any]:
    """A line of an evaluation file: what was said and the four verdicts, 0, 1 or null."""
    rollout, reward = scored.rollout, scored.reward
    exact: int | None = None
    if "digits" in example.metadata:
        told = described_digits(rollout.description or "")
        exact = int(told == tuple(example.metadata["digits"]))
    shortcut = None
    if reward.self_reward is not None:
        shortcut = int(reward.accuracy == 1.0 and reward.self_reward == 0.0)
    return {
        "index": rollout.index,
        "question": example.question,
        "gold": example.answer,
        "response": rollout.completion.text,
        "description": rollout.description,
        "reading": rollout.reading.text if rollout.reading else None,
        "accuracy": int(reward.accuracy),
        "self_reward": None if reward.self_reward is None else int(reward.self_reward),
        "description_exact": exact,
        "shortcut": shortcut,
    }


VERDICTS = {
    "accuracy": "accuracy",
    "self_reward": "self_reward",
    "description_exact": "description_exact",
    "shortcut": "shortcut_rate",
}
"""Verdict of an evaluation line -> name of its rate."""


def rates(lines: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Share of 1 among the lines that have the verdict; a verdict that none has is left out."""
    found = {}
    for verdict, name in VERDICTS.items():
        values = [line[verdict] for line in lines if line[verdict] is not None]
        if values:
            found[name] = sum(values) / len(values)
    return found


def reward_means(scored: Sequence[Scored]) -> dict[str, float]:
    """Mean rewards of a step, and the four cells of pass 1 x pass 2 as shares of its samples."""
    rewards = [s.reward for s in scored]
    count = max(len(rewards), 1)
    means = {
        "reward/accuracy": sum(r.accuracy for r in rewards) / count,
        "reward/format": sum(r.format for r in rewards) / count,
        "reward/total": sum(r.total for r in rewards) / count,
        "reward/leak_rate": sum(r.leak for r in rewards) / count,
    }
    judged = [r for r in rewards if r.self_reward is not None]
    if judged:
        means["reward/self_reward"] = sum(r.self_reward or 0.0 for r in judged) / len(judged)
        for right, said in ((1.0, "right"), (0.0, "wrong")):
            for read, heard in ((1.0, "right"), (0.0, "wrong")):
                cell = sum(r.accuracy == right and r.self_reward == read for r in judged)
                means[f"table/pass1_{said}_pass2_{heard}"] = cell / len(judged)
        means["reward/shortcut_rate"] = means["table/pass1_right_pass2_wrong"]
    return means
