"""The objective of a GRPO update, as configured, for one micro-batch.

In: the policy's logprobs and a packed batch. Out: a weighted sum over target tokens, its part of
the denominator, and sums to report, each with the number of tokens that it is over: `mismatch/…`
all that were sampled, the rest those in the loss, which `mask_beyond_nats` makes fewer. trainer/
step.py adds all of them up over micro-batches and ranks.
docs/algorithms.md says which values make which published algorithm.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from megatron_sr1.algorithm import correction
from megatron_sr1.algorithm.losses import policy_loss
from megatron_sr1.config.training import AlgorithmConfig
from megatron_sr1.errors import EngineError
from megatron_sr1.records import PackedBatch
from megatron_sr1.trainer.step import Sums, TokenLoss


def grpo_loss(
    algorithm: AlgorithmConfig, mismatch_bound: float, max_response_tokens: int
) -> TokenLoss:
    """The policy loss plus KL of a micro-batch.

    Args:
        algorithm: kind of loss, clips, correction.
        mismatch_bound: largest |engine - actor| logprob of a token, nats; 0 turns it off.
        max_response_tokens: constant length of `loss: dr_grpo`.
    """

    def loss(
        policy_logprobs: torch.Tensor, batch: PackedBatch
    ) -> tuple[torch.Tensor, torch.Tensor, Sums]:
        old = batch.old_logprobs
        if old is None:
            old = policy_logprobs.detach()
        assert batch.engine_logprobs is not None
        sampled = batch.loss_mask.sum()
        gaps = correction.mismatch_sums(batch.engine_logprobs, old, batch.loss_mask)
        _check_gap(float(gaps["mismatch/abs_max"]), mismatch_bound)
        batch, masked = _without_far(batch, old, algorithm)
        batch, weighted = _weighted(batch, old, algorithm)
        loss_sum, denominator, losses = policy_loss(
            policy_logprobs, old, batch, algorithm, max_response_tokens
        )
        in_loss = batch.loss_mask.sum()
        sums = {name: (value, sampled) for name, value in {**gaps, **masked}.items()}
        sums |= {name: (value, in_loss) for name, value in {**losses, **weighted}.items()}
        return loss_sum, denominator, sums

    return loss


def _without_far(
    batch: PackedBatch, old: torch.Tensor, algorithm: AlgorithmConfig
) -> tuple[PackedBatch, dict[str, torch.Tensor]]:
    """Far sequences out of the mask, if configured, and sums over the sampled tokens."""
    if algorithm.mask_beyond_nats == 0:
        return batch, {}
    assert batch.engine_logprobs is not None
    kept, reported = correction.near_sequences(
        batch.engine_logprobs,
        old,
        batch.loss_mask,
        batch.cu_seqlens,
        algorithm.mask_beyond_nats,
    )
    return replace(batch, loss_mask=kept), reported


def _weighted(
    batch: PackedBatch, old: torch.Tensor, algorithm: AlgorithmConfig
) -> tuple[PackedBatch, dict[str, torch.Tensor]]:
    """Advantages by importance weights, if configured, and sums over the tokens in the loss."""
    engine, level = batch.engine_logprobs, algorithm.importance_sampling
    assert engine is not None and batch.advantages is not None
    reported: dict[str, torch.Tensor] = {}
    if level != "off":
        cap = algorithm.importance_cap
        borders = batch.cu_seqlens if level == "sequence" else None
        weights = correction.truncated_importance_weights(
            engine, old, batch.loss_mask, cap, borders
        )
        reported = correction.weight_sums(weights, batch.loss_mask, cap)
        batch = replace(batch, advantages=batch.advantages * weights)
    return batch, reported


def _check_gap(worst: float, bound: float) -> None:
    if 0 < bound < worst:
        raise EngineError(
            f"engine and actor disagree by {worst:.2g} nats on a sampled token, at most "
            f"{bound:.2g} (rollout.mismatch_bound): the engine does not hold the "
            "actor's weights, or their kernels differ more than the bound allows"
        )
