"""From rewards to advantages: which reward teaches which tokens.

In: scored rollouts of a step, groups of n. Out: `Credit`, two advantages a rollout. Sources: the
sum of rewards is Vision-SR1's (arXiv 2508.19652, version 1); an answer's and a visual reward, each
normalised on its own, its version 2's and GDPO's (arXiv 2601.05242); spans are told of in that
version's text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_sr1.algorithm.advantages import group_advantages, weighted_sum
from megatron_sr1.config.training import AlgorithmConfig
from megatron_sr1.records import Reward
from megatron_sr1.rewards.response import DESCRIPTION, find_span


@dataclass(frozen=True)
class Credit:
    """Advantages of a step's rollouts.

    Attributes:
        advantages: [groups, n] float32, of all tokens but a description's.
        description_advantages: [groups, n] float32, of the description's tokens; the same unless
            credit goes by span.
        by_span: whether the two differ, so that the description's tokens must be found.
    """

    advantages: np.ndarray
    description_advantages: np.ndarray
    by_span: bool = False

    @property
    def teaching(self) -> list[int]:
        """Groups with an advantage other than 0: those whose rewards have spread."""
        some = (self.advantages != 0) | (self.description_advantages != 0)
        return np.flatnonzero(some.any(axis=1)).tolist()

    def of(self, group: int, sample: int) -> tuple[float, float | None]:
        """A rollout's advantage, and its description's if credit goes by span."""
        advantage = float(self.advantages[group, sample])
        if not self.by_span:
            return advantage, None
        return advantage, float(self.description_advantages[group, sample])


def credit(
    rewards: Sequence[Reward], samples_per_prompt: int, algorithm: AlgorithmConfig, pay_leaks: bool
) -> tuple[Credit, dict[str, float]]:
    """Advantages of a step, and how its groups spread.

    Args:
        rewards: group behind group.
        samples_per_prompt: n.
        algorithm: estimator, credit and weights.
        pay_leaks: False: a description that states the answer has self-reward 0.

    Returns:
        the credit, and `groups/…` of each reward that was normalised: no_spread, floored, std.
    """
    estimator, floor = algorithm.advantage, algorithm.std_floor

    def compared(values: Sequence[float], name: str) -> tuple[np.ndarray, dict[str, float]]:
        groups = np.array(values, np.float64).reshape(-1, samples_per_prompt)
        advantages, stats = group_advantages(groups, floor, estimator)
        return advantages, {f"groups/{name}{key}": value for key, value in stats.items()}

    if algorithm.credit == "scalar":
        advantages, stats = compared([r.total for r in rewards], "")
        return Credit(advantages, advantages), stats
    share = algorithm.format_share
    answer, stats = compared([r.accuracy + share * r.format for r in rewards], "answer_")
    visual, more = compared([visual_reward(r, share, pay_leaks) for r in rewards], "visual_")
    stats |= more
    if algorithm.credit == "component":
        weights = (algorithm.answer_weight, algorithm.visual_weight)
        advantages = weighted_sum((answer, visual), weights)
        return Credit(advantages, advantages), stats
    return Credit(answer, np.where(np.isnan(visual), answer, visual), by_span=True), stats


def visual_reward(reward: Reward, format_share: float, pay_leaks: bool) -> float:
    """self-reward + format_share x format; NaN where there is no self-reward, as without images."""
    if reward.self_reward is None:
        return float("nan")
    paid = 0.0 if reward.leak and not pay_leaks else reward.self_reward
    return paid + format_share * reward.format


def description_tokens(pieces: Sequence[str]) -> tuple[int, int]:
    """The tokens of a response that hold a character of its description, marks included.

    A mark may share a token with its neighbours (as in `.</`), and that token is the
    description's. The marks are ASCII, which stays whole in the text of a single token even where
    the token holds parts of other characters; so the pieces may be joined and searched.

    Args:
        pieces: text of each token by itself, special tokens empty.

    Returns:
        first token and the one behind the last; (0, 0) if there is no closed description.
    """
    span = find_span("".join(pieces), DESCRIPTION)
    if span is None:
        return 0, 0
    ends = np.cumsum([len(piece) for piece in pieces])
    first = int(np.searchsorted(ends, span.start, side="right"))
    last = int(np.searchsorted(ends, span.end, side="left"))
    return first, last + 1
