"""Supervised fine-tuning: the cold start before reinforcement learning."""

from __future__ import annotations

import torch

from megatron_sr1.algorithm.losses import sft_loss
from megatron_sr1.data.packing import size_of
from megatron_sr1.errors import DataError
from megatron_sr1.records import PackedBatch
from megatron_sr1.runtime.groups import gather_objects
from megatron_sr1.trainer.actor import Actor
from megatron_sr1.trainer.context import Context, Evaluate
from megatron_sr1.trainer.samples import Samples, without_targets
from megatron_sr1.trainer.step import Sums, named, update


def train_sft(
    context: Context, actor: Actor, samples: Samples, evaluate: Evaluate | None = None
) -> None:
    """Run the supervised steps that are left; the loss is a mean over target tokens.

    `evaluate` is called as `Context.finish_step` says.
    """
    data = context.groups.data
    context.evaluate_at_start(evaluate)
    for _ in context.steps():
        with context.phase("prompts"):
            # Each rank reads some; who trains on which is decided when all lengths are known.
            indices = context.loader.next_step()[data.rank :: data.size]
            is_leader = context.groups.is_replica_leader
            samples.pixels.start(indices)
            read = context.read_usable(samples.conversation, indices, is_leader)
            context.count_skipped()
            everyone = [sample for part in gather_objects(read, data) for sample in part]
            if not everyone:
                raise DataError("no sample of this step could be read; see the warnings above")
            shares = samples.shares([size_of(sample) for sample in everyone], data.size)
            own = [everyone[place] for place in shares[data.rank]]
            own = own or [without_targets(everyone[0])]
            if context.groups.is_first_stage:  # the others take none
                samples.pixels.start(sample.index for sample in own if sample.num_images)
            # All rows now, so that the pixels can be freed.
            batches = list(samples.pack(own, context.groups))
        samples.forget_pixels()
        if context.step + 1 < context.config.num_steps:
            samples.pixels.start(context.loader.upcoming()[data.rank :: data.size])
        with context.phase("update"):
            measured = update(actor, batches, token_loss, temperature=1.0)
        del batches  # the only copy of their pixels
        context.throughput.count_samples("update", own)
        samples.forget()
        with context.phase("prompts"):
            samples.pixels.finish()
        context.finish_step(named([measured]), actor, evaluate)


def token_loss(
    policy_logprobs: torch.Tensor, batch: PackedBatch
) -> tuple[torch.Tensor, torch.Tensor, Sums]:
    """Return the negative log-likelihood of the targets, and their number as denominator."""
    loss_sum, num_tokens = sft_loss(policy_logprobs, batch.loss_mask), batch.loss_mask.sum().int()
    return loss_sum, num_tokens, {"loss": (loss_sum.detach(), num_tokens)}
