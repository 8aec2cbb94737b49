"""From rewards to the loss of a GRPO update: advantages, and the objective of a micro-batch.

In: a step's rewards in groups of n, then the policy's logprobs of packed sequences. Out: `Credit`,
and a weighted sum over target tokens with its part of the denominator. docs/algorithms.md says
which settings make which published algorithm.

Sources of the credit: the sum of rewards is Vision-SR1's (arXiv 2508.19652, version 1); an answer's
and a visual reward, each normalised on its own, are its version 2's and GDPO's (arXiv 2601.05242);
advantages per span are described in the text of that version.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from megatron_sr1.algorithm import correction
from megatron_sr1.algorithm.advantages import group_advantages, weighted_sum
from megatron_sr1.algorithm.losses import policy_loss
from megatron_sr1.config.rollout import RolloutConfig
from megatron_sr1.config.run import Config
from megatron_sr1.config.training import AlgorithmConfig
from megatron_sr1.errors import EngineError
from megatron_sr1.records import PackedBatch, Reward
from megatron_sr1.trainer.step import Sums, TokenLoss


@dataclass(frozen=True)
class Credit:
    """Advantages of a step's rollouts.

    Attributes:
        advantages: [groups, n] float32, of all tokens, if credit is per span but a description's.
        description_advantages: [groups, n] float32, of the description's tokens if credit is per
            span.
    """

    advantages: np.ndarray
    description_advantages: np.ndarray | None = None

    @property
    def teaching(self) -> list[int]:
        """Groups with an advantage other than 0: those whose rewards differ."""
        some = self.advantages != 0
        if self.description_advantages is not None:
            some |= self.description_advantages != 0
        return np.flatnonzero(some.any(axis=1)).tolist()

    def advantages_of(self, number: int) -> dict[str, float]:
        """Return a rollout's `advantage` and, if credit is per span, `description_advantage`."""
        kinds = {"advantage": self.advantages, "description_advantage": self.description_advantages}
        return {name: float(kind.flat[number]) for name, kind in kinds.items() if kind is not None}


def credit(rewards: Sequence[Reward], config: Config) -> tuple[Credit, dict[str, float]]:
    """Compute a step's advantages from its rewards, one group after the other, and their spread.

    Returns:
        the credit, and `groups/…` of each reward that was normalised: no_spread, floored, std.
    """
    algorithm, pay_leaks = config.algorithm, config.reward.pay_leaks

    def compare(values: Sequence[float], name: str) -> tuple[np.ndarray, dict[str, float]]:
        groups = np.array(values, np.float64).reshape(-1, config.rollout.samples_per_prompt)
        advantages, stats = group_advantages(groups, algorithm.std_floor, algorithm.advantage)
        return advantages, {f"groups/{name}{key}": value for key, value in stats.items()}

    if algorithm.credit == "scalar":
        advantages, stats = compare([r.total for r in rewards], "")
        return Credit(advantages), stats
    share = algorithm.format_share
    answer, stats = compare([r.accuracy + share * r.format for r in rewards], "answer_")
    visual, more = compare([visual_reward(r, share, pay_leaks) for r in rewards], "visual_")
    stats |= more
    if algorithm.credit == "component":
        weights = (algorithm.answer_weight, algorithm.visual_weight)
        return Credit(weighted_sum((answer, visual), weights)), stats
    return Credit(answer, np.where(np.isnan(visual), answer, visual)), stats


def visual_reward(reward: Reward, format_share: float, pay_leaks: bool) -> float:
    """Return self-reward + format_share x format; NaN without a self-reward, as without images."""
    if reward.self_reward is None:
        return float("nan")
    paid = 0.0 if reward.leak and not pay_leaks else reward.self_reward
    return paid + format_share * reward.format


def grpo_loss(algorithm: AlgorithmConfig, rollout: RolloutConfig) -> TokenLoss:
    """Return the policy loss plus KL of a micro-batch, as configured.

    It reports `mismatch/…` over all sampled tokens, everything else over those in the loss, which
    `mask_beyond_nats` makes fewer. `rollout.max_response_tokens` is the constant length of
    `loss: dr_grpo`.
    """
    mismatch_bound = rollout.mismatch_bound

    def loss(
        policy_logprobs: torch.Tensor, batch: PackedBatch
    ) -> tuple[torch.Tensor, torch.Tensor, Sums]:
        old, engine = batch.old_logprobs, batch.engine_logprobs
        if old is None:
            old = policy_logprobs.detach()
        assert engine is not None and batch.advantages is not None
        sampled = batch.loss_mask.sum()
        over_sampled = correction.mismatch_sums(engine, old, batch.loss_mask)
        worst = float(over_sampled["mismatch/abs_max"])
        if 0 < mismatch_bound < worst:
            raise EngineError(
                f"engine and actor disagree by {worst:.2g} nats on a sampled token, at most "
                f"{mismatch_bound:.2g} (rollout.mismatch_bound): the engine does not hold the "
                "actor's weights, or their kernels differ more than the bound allows"
            )
        if algorithm.mask_beyond_nats > 0:
            near, masked = correction.near_sequences(
                engine, old, batch.loss_mask, batch.cu_seqlens, algorithm.mask_beyond_nats
            )
            batch = replace(batch, loss_mask=near)
            over_sampled |= masked
        weighted: dict[str, torch.Tensor] = {}
        if algorithm.importance_sampling != "off":
            cap, mask = algorithm.importance_cap, batch.loss_mask
            borders = batch.cu_seqlens if algorithm.importance_sampling == "sequence" else None
            weights = correction.truncated_importance_weights(engine, old, mask, cap, borders)
            weighted = correction.weight_sums(weights, mask, cap)
            batch = replace(batch, advantages=batch.advantages * weights)
        loss_sum, denominator, over_loss = policy_loss(
            policy_logprobs, old, batch, algorithm, rollout.max_response_tokens
        )
        in_loss = batch.loss_mask.sum()
        sums = {name: (value, sampled) for name, value in over_sampled.items()}
        sums |= {name: (value, in_loss) for name, value in {**over_loss, **weighted}.items()}
        sums["loss"] = (loss_sum.detach(), denominator)
        return loss_sum, denominator.int(), sums

    return loss
