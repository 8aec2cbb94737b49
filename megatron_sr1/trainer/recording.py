"""What a run keeps of a step's rollouts: lines of rollouts/step_N.jsonl, and metrics.

In: scored rollouts. Out: a JSON line for each, their mean rewards, and the four cells of pass 1 x
pass 2.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megatron_sr1.records import Example, texts
from megatron_sr1.rewards.score import cross
from megatron_sr1.rollout.text_stats import step_metrics
from megatron_sr1.runtime.groups import gather_on_first
from megatron_sr1.trainer.context import Context
from megatron_sr1.trainer.grading import Graded, Scored
from megatron_sr1.trainer.samples import Samples

MEANS_BY_SET = ("reward/accuracy", "reward/self_reward")
"""Means of a step that each set of `data.mixture` has too, as `NAME/SET`."""


def record(context: Context, samples: Samples, graded: Graded) -> dict[str, float]:
    """Write and show a step's rollouts; return the metrics of their rewards and texts.

    Collective over all ranks; the writer alone gets all rollouts, and has metrics.
    """
    parts = gather_on_first(graded.own, context.groups.background)
    if not context.is_writer:
        return {}
    found = {item.key: item for part in parts for item in part}
    scored = [found[verdict.key] for verdict in graded.verdicts]
    lines = []
    for number, item in enumerate(scored):
        index = item.rollout.index
        facts = (graded.credited.advantages_of(number), samples.set_of(index))
        lines.append(rollout_line(context.step + 1, item, samples.example(index), *facts))
    context.record_rollouts(lines, samples.images)
    texts = step_metrics([s.rollout for s in scored], samples.processor.encode)
    return {**reward_means(scored), **set_means(scored, samples.set_of), **texts}


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
