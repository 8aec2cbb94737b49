"""One pass of the actor over packed micro-batches: logprobs without gradients, or an update.

The objective of an update is a sum over target tokens divided by a denominator, target tokens or
sequences, that is itself summed over all micro-batches and data-parallel ranks (Megatron's
`calculate_per_token_loss`, whatever is counted), so how samples are packed and distributed changes
nothing. Context-parallel ranks have the same whole rows and the same loss: one of them counts it,
and each propagates gradients to its own tokens.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_sr1.errors import SR1Error
from megatron_sr1.records import PackedBatch, TrainSample
from megatron_sr1.runtime import cpu
from megatron_sr1.runtime.groups import Groups
from megatron_sr1.trainer.actor import Actor

log = logging.getLogger(__name__)
Sums = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""Name -> (sum over tokens of a micro-batch, number of these tokens), scalars.

An update reports the sum divided by the number, each summed over all micro-batches and ranks; for
names that end in `_max`, the maximum; for `num_…`, the sum itself. A mean or maximum over no token
is absent."""
TokenLoss = Callable[..., tuple[torch.Tensor, torch.Tensor, Sums]]
"""(policy_logprobs [1, T], batch) -> (loss summed over its target tokens, its part of the loss's
denominator, int32, what to report: `loss`, these two, and more). Megatron calls it, so that no
function of ours lies between."""


def sample_logprobs(
    actor: Actor, samples: Sequence[TrainSample], batches: Sequence[PackedBatch], temperature: float
) -> list[np.ndarray]:
    """Return the logprobs of every sample's targets under the actor's weights, without gradients.

    `batches` are all of `samples`, packed, the same on all ranks of a replica; `temperature`
    divides the logits.

    Returns:
        per sample [tokens] float32; entry t is the logprob of token t, 0 if it is no target.
    """
    found = [np.zeros(len(sample.token_ids), np.float32) for sample in samples]
    for batch, row in zip(batches, row_logprobs(actor, batches, temperature), strict=True):
        values = row[0].numpy()
        for place, start in zip(batch.sample_ids, batch.cu_seqlens.tolist(), strict=False):
            found[place][1:] = values[start : start + len(found[place]) - 1]
    return found


def row_logprobs(
    actor: Actor, batches: Sequence[PackedBatch], temperature: float
) -> list[torch.Tensor]:
    """Return the logprobs of every row's targets, aligned as its other values are.

    The rows are the same on all ranks of a replica; `temperature` divides the logits.

    Returns:
        per row [1, T] float32 on the host, without gradients; 0 at tokens that are no targets.
    """
    pipeline, device = actor.groups.pipeline, actor.groups.device
    with torch.no_grad(), _evaluating(actor.chunks), cpu.megatron_mode():
        rows = _schedule(actor, actor.chunks, batches, temperature, loss=None)()
    if not actor.groups.is_last_stage:
        rows = [torch.empty(b.input_ids.shape, dtype=torch.float32, device=device) for b in batches]
    found = []
    for _, row in zip(batches, rows, strict=False):  # rows of padding are left out
        if pipeline.size > 1:
            dist.broadcast(row, src=pipeline.ranks[-1], group=pipeline.process_group)
        found.append(row.cpu())
    return found


@contextlib.contextmanager
def _evaluating(chunks: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Put the chunks into evaluation mode for a block, so that no layer keeps what it recomputes.

    In training mode Megatron checkpoints layers whether there are gradients or not, and Transformer
    Engine keeps the FP8 scales of each checkpoint for a backward pass.
    """
    for chunk in chunks:
        chunk.eval()
    try:
        yield
    finally:
        for chunk in chunks:
            chunk.train()


def update(
    actor: Actor, batches: Sequence[PackedBatch], loss: TokenLoss, temperature: float
) -> dict[str, float]:
    """Train on one batch: forward, backward, gradient reduction and clipping, optimizer step.

    `batches` are this data-parallel rank's micro-batches, of which another rank may have fewer;
    `temperature` divides the logits.

    Returns:
        equal on all ranks: `loss`, divided by its denominator over the whole update, `grad_norm`,
        `learning_rate`, `num_tokens` (targets, masked by the loss or not), what the loss reports
        as described at `Sums`, and `skipped_updates`: 1 if no token of any rank is in the loss.
        Then weights, moments and schedule stay as they are, and `loss` and `grad_norm` are absent.

    Raises:
        SR1Error: the loss is not finite; nothing was updated.
    """
    actor.restore()
    for wrapped in actor.wrapped:
        wrapped.zero_grad_buffer()
    actor.optimizer.zero_grad()
    learning_rate = actor.optimizer.param_groups[0]["lr"]
    with cpu.megatron_mode():
        reported = _schedule(actor, actor.wrapped, batches, temperature, loss)()
    num_tokens = torch.stack([batch.loss_mask.sum() for batch in batches]).sum()
    measured = _measured([*reported, {"num_tokens": (num_tokens, num_tokens)}], actor.groups)
    measured |= {"learning_rate": float(learning_rate), "skipped_updates": 0.0}
    if "loss" not in measured:  # the same on all ranks
        if actor.groups.world.rank == 0:
            log.warning(
                "update skipped: none of its %d target tokens is in the loss (see "
                "algorithm.mask_beyond_nats); weights, moments and learning rate stay as they are",
                measured["num_tokens"],
            )
        return {**measured, "skipped_updates": 1.0}
    if not np.isfinite(measured["loss"]):
        raise SR1Error("the loss is not finite; nothing was updated: lower the learning rate")
    with cpu.megatron_mode():
        success, grad_norm, _ = actor.optimizer.step()
    assert success
    actor.scheduler.step(increment=1)
    return {**measured, "grad_norm": float(grad_norm)}


def named(measured: list[dict[str, float]]) -> dict[str, float]:
    """Combine the measurements of a step's updates under their names in metrics.jsonl.

    Means over the updates that have the name; for maxima the largest, for skipped updates the sum.
    """
    named: dict[str, float] = {}
    for name in dict.fromkeys(name for m in measured for name in m):
        values = [m[name] for m in measured if name in m]
        of_optimizer = name in ("grad_norm", "learning_rate")
        group = "" if "/" in name else "optimizer/" if of_optimizer else "actor/"
        mean = sum(values) / (1 if name == "skipped_updates" else len(values))
        named[group + name] = max(values) if name.endswith("_max") else mean
    return named


def _measured(reported: Sequence[Sums], groups: Groups) -> dict[str, float]:
    """Combine what the last pipeline stages reported, as described at `Sums`, on all ranks."""
    sums: dict[str, torch.Tensor] = {}
    for name, pair in (item for found in reported for item in found.items()):
        found = torch.stack([value.detach().double() for value in pair])
        add = torch.maximum if name.endswith("_max") else torch.add
        sums[name] = add(sums[name], found) if name in sums else found
    counted = groups.is_last_stage and groups.tensor.rank == 0 and groups.counts_tokens
    names: list[Any] = [sorted(sums)]
    pipeline, device = groups.pipeline, groups.device
    if pipeline.size > 1:
        dist.broadcast_object_list(names, pipeline.ranks[-1], pipeline.process_group)
    totals = torch.zeros(len(names[0]), 2, dtype=torch.float64, device=device)
    if counted:
        totals = torch.stack([sums[name].to(device) for name in names[0]])
    maxima = totals.clone()
    if groups.world.size > 1:
        dist.all_reduce(totals)
        dist.all_reduce(maxima, op=dist.ReduceOp.MAX)
    measured = {}
    for name, (total, num_tokens), (largest, _) in zip(
        names[0], totals.tolist(), maxima.tolist(), strict=True
    ):
        if name.rpartition("/")[2].startswith("num_"):
            measured[name] = total
        elif num_tokens > 0:
            measured[name] = largest if name.endswith("_max") else total / num_tokens
    return measured


def _schedule(
    actor: Actor,
    models: list[Any],
    batches: Sequence[PackedBatch],
    temperature: float,
    loss: TokenLoss | None,
) -> Callable[[], list[Any]]:
    """Return Megatron's pipeline schedule over the micro-batches, to be called in its CPU mode.

    On the last stage it returns what the loss reports of each; without a loss, the logprobs.
    """
    from megatron.core.pipeline_parallel import get_forward_backward_func

    assert actor.can_compute, "weights are in host memory: restore them first"
    groups, rows = actor.groups, batches
    if len(models) > 1:
        # The interleaved schedule needs a multiple of the pipeline's ranks.
        missing = -len(rows) % groups.pipeline.size
        rows = [*rows, *[empty_row(actor.row_multiple)] * missing]

    def forward(iterator: Iterator[PackedBatch], model: Any) -> tuple[torch.Tensor, Any]:
        batch = to_device(next(iterator), groups.device)
        output = model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            cu_seqlens=batch.cu_seqlens,
            shared_tokens=batch.shared_tokens,
            vision=batch.vision,
            labels=batch.labels,
            wanted=batch.loss_mask != 0,
            temperature=temperature,
        )
        return output, loss and partial(loss, batch=batch)

    return partial(
        get_forward_backward_func(),
        forward_step_func=forward,
        data_iterator=[iter(rows) for _ in models],
        model=models,
        num_microbatches=len(rows),
        seq_length=rows[0].input_ids.shape[1],
        micro_batch_size=1,
        forward_only=loss is None,
    )


def to_device(batch: PackedBatch, device: torch.device) -> PackedBatch:
    """Return the batch with its tensors on `device`."""
    moved: dict[str, Any] = {}
    for name, value in vars(batch).items():
        if isinstance(value, torch.Tensor):
            moved[name] = value.to(device, non_blocking=True)
    if batch.vision is not None:
        pixels = batch.vision.pixel_values.to(device, non_blocking=True)
        moved["vision"] = replace(batch.vision, pixel_values=pixels)
    return replace(batch, **moved)


def empty_row(num_tokens: int) -> PackedBatch:
    """Return a row of padding without samples or targets."""
    nothing, ids = torch.zeros(1, num_tokens), torch.zeros(1, num_tokens, dtype=torch.int64)
    return PackedBatch(
        sample_ids=(),
        input_ids=ids,
        labels=ids,
        loss_mask=nothing,
        position_ids=torch.arange(num_tokens).expand(3, 1, -1),
        cu_seqlens=torch.tensor([0, num_tokens], dtype=torch.int32),
        advantages=nothing,
        engine_logprobs=nothing,
    )
