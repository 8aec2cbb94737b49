"""Supervised fine-tuning: the cold start before reinforcement learning."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from megatron_sr1.algorithm.losses import sft_loss
from megatron_sr1.data.loader import shard
from megatron_sr1.data.packing import size_of
from megatron_sr1.errors import DataError
from megatron_sr1.records import PackedBatch, TrainSample
from megatron_sr1.runtime.collectives import gather_objects
from megatron_sr1.trainer.actor import Actor
from megatron_sr1.trainer.context import Context
from megatron_sr1.trainer.samples import Samples
from megatron_sr1.trainer.step import named, update


def train_sft(context: Context, actor: Actor, samples: Samples) -> None:
    """Run the supervised steps that are left; the loss is a mean over target tokens.

    Args:
        context: configuration, groups, run directory, sinks, loader.
        actor: with its optimizer.
        samples: conversations.
    """
    while context.has_steps_left:
        indices = context.loader.next_step()
        with context.phase("prompts"):
            chosen = _conversations(context, samples, indices)
            batches = context.pack(chosen, samples)
        with context.phase("update"):
            measured = update(actor, batches, _token_loss, temperature=1.0)
        if context.groups.speaks_for_samples:
            context.throughput.count_samples("update", chosen)
        values = named([measured])
        samples.forget()
        context.finish_step("sft", values, actor)


def _token_loss(
    policy_logprobs: torch.Tensor, batch: PackedBatch
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    return sft_loss(policy_logprobs, batch.loss_mask), batch.loss_mask.sum(), {}


def _conversations(context: Context, samples: Samples, indices: list[int]) -> list[TrainSample]:
    """This rank's share of a step; one without targets where it would have none.

    Each rank reads some; who learns from what is settled when all lengths are known.
    """
    groups = context.groups
    read = []
    for index in shard(indices, groups.data.rank, groups.data.size):
        try:
            read.append(samples.conversation(index))
        except DataError as error:
            context.skip(error)
    context.count_skipped(groups.speaks_for_samples)
    everyone = [sample for part in gather_objects(read, groups.data) for sample in part]
    if not everyone:
        raise DataError("no sample of this step could be read; see the warnings above")
    mine = [everyone[i] for i in context.share([size_of(sample) for sample in everyone])]
    spare = replace(everyone[0], loss_mask=np.zeros_like(everyone[0].loss_mask))
    return mine or [spare]
