"""Supervised fine-tuning: the cold start before reinforcement learning."""

from __future__ import annotations

import torch

from megatron_sr1.algorithm.losses import sft_loss
from megatron_sr1.data.packing import size_of
from megatron_sr1.errors import DataError
from megatron_sr1.records import PackedBatch, TrainSample
from megatron_sr1.runtime.groups import gather_objects
from megatron_sr1.trainer.actor import Actor
from megatron_sr1.trainer.context import Context
from megatron_sr1.trainer.samples import Samples
from megatron_sr1.trainer.step import Sums, named, update


def train_sft(context: Context, actor: Actor, samples: Samples) -> None:
    """Run the supervised steps that are left; the loss is a mean over target tokens."""
    while context.has_steps_left:
        with context.phase("prompts"):
            own = _conversations(context, samples, context.loader.next_step())
            batches = samples.pack(own, context.groups)
        with context.phase("update"):
            measured = update(actor, batches, token_loss, temperature=1.0)
        if context.groups.is_replica_leader:
            context.throughput.count_samples("update", own)
        samples.forget()
        context.finish_step(named([measured]), actor)


def token_loss(
    policy_logprobs: torch.Tensor, batch: PackedBatch
) -> tuple[torch.Tensor, torch.Tensor, Sums]:
    """Return the negative log-likelihood of the targets, and their number as denominator."""
    loss_sum, num_tokens = sft_loss(policy_logprobs, batch.loss_mask), batch.loss_mask.sum().int()
    return loss_sum, num_tokens, {"loss": (loss_sum.detach(), num_tokens)}


def _conversations(context: Context, samples: Samples, indices: list[int]) -> list[TrainSample]:
    """Return this rank's part of a step.

    Each rank reads some; who trains on which is decided when all lengths are known.
    """
    groups = context.groups
    own = indices[groups.data.rank :: groups.data.size]
    read = context.read_usable(samples.conversation, own, groups.is_replica_leader)
    everyone = [sample for part in gather_objects(read, groups.data) for sample in part]
    if not everyone:
        raise DataError("no sample of this step could be read; see the warnings above")
    return samples.own_part(everyone, size_of, lambda sample: sample, groups.data)
