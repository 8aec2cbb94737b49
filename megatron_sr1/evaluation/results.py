"""What an evaluation found: a line per response, and the rates of a set."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from megatron_sr1.records import RIGHT_FROM, Example
from megatron_sr1.rewards.answers import clean
from megatron_sr1.rewards.score import VERDICTS, is_exact, rates
from megatron_sr1.trainer.rollouts import Scored, texts

KEPT = ("index", "sample", "answer", "source", *VERDICTS)
"""What `set_rates` needs of a line."""
SOURCES = ("data_source", "source")
"""Columns of a data set that name where a sample comes from."""


def evaluation_line(scored: Scored, example: Example) -> dict[str, Any]:
    """Return a line of an evaluation file: the texts and the four verdicts, 0, 1 or null.

    Accuracy and self-reward are what the user's reward function gave, if there is one.
    """
    rollout, reward = scored.rollout, scored.reward
    expected = example.metadata.get("expected_description", example.metadata.get("digits"))
    exact = None if expected is None else int(is_exact(rollout.description or "", expected))
    shortcut = None
    if reward.self_reward is not None:
        shortcut = int(reward.accuracy >= RIGHT_FROM > reward.self_reward)
    sources = (example.metadata[name] for name in SOURCES if name in example.metadata)
    return {
        "index": rollout.index,
        "sample": rollout.sample,
        "source": next(sources, None),
        "metadata": dict(example.metadata),
        **texts(rollout, example),
        "answer": reward.answer,
        "accuracy": _short(reward.accuracy),
        "self_reward": _short(reward.self_reward),
        "description_exact": exact,
        "shortcut": shortcut,
    }


def verdicts_of(line: dict[str, Any]) -> dict[str, Any]:
    """Return what `set_rates` needs of a line, without its texts."""
    return {name: line.get(name) for name in KEPT}


def set_rates(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return the rates of a set's responses, in [0, 1], and `questions`, their number.

    accuracy, self_reward, description_exact and shortcut_rate, those that apply, are means over all
    responses. With k > 1 responses to a question also `pass@k`, the share of questions with a right
    one, and `majority@k`, that of questions whose most frequent answer is right; of equally
    frequent answers the first counts.
    """
    by_question: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        by_question[row["index"]].append(row)
    found: dict[str, float] = {**rates(rows), "questions": len(by_question)}
    k = max(map(len, by_question.values()), default=0)
    if k > 1:
        groups = by_question.values()
        right = sum(max(row["accuracy"] for row in group) >= RIGHT_FROM for group in groups)
        found[f"pass@{k}"] = right / len(groups)
        found[f"majority@{k}"] = sum(map(_is_majority_right, groups)) / len(groups)
    return found


def _is_majority_right(group: Sequence[dict[str, Any]]) -> bool:
    answers = [clean(row["answer"] or "") for row in group]
    ((most, _),) = Counter(answers).most_common(1)
    return bool(group[answers.index(most)]["accuracy"] >= RIGHT_FROM)


def _short(verdict: float | None) -> float | None:
    """Convert 0.0 and 1.0 to int, for the file."""
    return int(verdict) if verdict in (0.0, 1.0) else verdict
