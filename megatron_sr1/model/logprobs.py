"""Logprobs and entropy of labels from hidden states, over a vocabulary split across ranks.

In: hidden states, this rank's rows of the output layer, labels. Out: one float32 number a token.
Logits exist for one chunk of tokens at a time and are made again in the backward pass. Tokens that
nobody asks for, and on the way back those without a gradient, have none: prompts and images cost
nothing.

With l the logits over the temperature, p = softmax(l) and H the entropy,
    d logprob(y) / d l_j = [j = y] - p_j,      d H / d l_j = -p_j (log p_j + H).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
)

from megatron_sr1.runtime.groups import Group

# A shard without real rows has no largest logit; this stands for it, finite so that 0 * it is 0.
NO_LOGIT = -1e30


def vocabulary_rows(vocab_size: int, num_rows: int, rank: int) -> tuple[int, int]:
    """First id of a rank's shard, and how many of its rows are ids and not padding.

    Args:
        vocab_size: ids there are.
        num_rows: of each rank's shard.
        rank: of the shard.
    """
    first = rank * num_rows
    return first, min(max(vocab_size - first, 0), num_rows)


def label_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    group: Group,
    vocab_size: int,
    wanted: torch.Tensor | None = None,
    temperature: float = 1.0,
    chunk_tokens: int = 1024,
    sequence_parallel: bool = False,
    with_entropy: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Logprob of each token's label under softmax(logits / temperature).

    Args:
        hidden: [T, 1, width], or [T / ranks, 1, width] under sequence parallelism.
        weight: [rows, width], this rank's shard of the output layer; padding rows come last.
        labels: [1, T] int64.
        group: tensor-parallel ranks.
        vocab_size: ids there are, without padding.
        wanted: [1, T] bool, the tokens to look at; None for all.
        temperature: divides the logits, > 0.
        chunk_tokens: tokens whose logits exist at a time.
        sequence_parallel: whether `hidden` is split over the ranks.
        with_entropy: whether to return the entropy too; it is differentiable as well.

    Returns:
        logprobs [1, T] float32 nats and entropy [1, T] float32 nats or None; equal on all ranks. 0
        at tokens that are not wanted.
    """
    whole = gather_hidden(hidden, group, sequence_parallel)
    rows, tokens = whole.shape[0], labels.numel()
    assert rows == tokens, f"{rows} hidden states and {tokens} labels"
    first, num_ids = vocabulary_rows(vocab_size, weight.shape[0], group.rank)
    used = torch.nonzero(torch.ones_like(labels[0]) if wanted is None else wanted[0])[:, 0]
    logprobs, entropy = _LabelLogprobs.apply(
        whole[:, 0], weight, labels[0], used, first, num_ids, group, temperature, chunk_tokens,
        with_entropy,
    )  # fmt: skip
    return logprobs[None], entropy[None] if with_entropy else None


def full_logits(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    *,
    group: Group,
    vocab_size: int,
    sequence_parallel: bool = False,
) -> torch.Tensor:
    """All logits of a row, for tools and tests.

    Args:
        hidden: as `label_logprobs`.
        weight: as `label_logprobs`.
        group: tensor-parallel ranks.
        vocab_size: ids there are, without padding.
        sequence_parallel: whether `hidden` is split over the ranks.

    Returns:
        [1, T, vocab_size] float32, equal on all ranks.
    """
    whole = gather_hidden(hidden, group, sequence_parallel)
    shard = F.linear(whole, weight).float()
    logits = gather_from_tensor_model_parallel_region(shard, group=group.process_group)
    return logits[..., :vocab_size].transpose(0, 1)


def gather_hidden(hidden: torch.Tensor, group: Group, sequence_parallel: bool) -> torch.Tensor:
    """The whole row on every rank; the ranks' gradients are summed on the way back."""
    if sequence_parallel:
        return gather_from_sequence_parallel_region(hidden, group=group.process_group)
    return copy_to_tensor_model_parallel_region(hidden, group=group.process_group)


class _LabelLogprobs(torch.autograd.Function):
    """One rank's part; gradients are of this rank's shard and are summed by the caller."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        used: torch.Tensor,
        first: int,
        num_ids: int,
        group: Group,
        temperature: float,
        chunk_tokens: int,
        with_entropy: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        own = weight[:num_ids]
        local_labels = labels - first
        parts = [
            _shard_sums(
                _logits(hidden.index_select(0, rows), own, temperature),
                local_labels[rows],
                with_entropy,
            )
            for rows in used.split(chunk_tokens)
        ]
        largest, sums, targets, moments = (torch.cat(column) for column in zip(*parts, strict=True))
        if group.size > 1:
            is_own = _own_labels(local_labels[used], num_ids)[1][:, 0]
            largest, sums, targets, moments = _over_ranks(
                largest, sums, targets, moments, is_own, group
            )
        log_sums = sums.log()
        found = targets - log_sums, log_sums - moments / sums, largest + log_sums
        logprobs, entropy, normalisers = (
            values.new_zeros(len(labels)).index_copy_(0, used, values) for values in found
        )
        ctx.save_for_backward(hidden, weight, local_labels, normalisers, entropy, used)
        ctx.num_ids, ctx.temperature, ctx.chunk_tokens = num_ids, temperature, chunk_tokens
        ctx.with_entropy = with_entropy
        if not with_entropy:
            ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        hidden, weight, local_labels, normalisers, entropy, used = ctx.saved_tensors
        logprob_gradient, entropy_gradient = gradients
        has_gradient = logprob_gradient != 0
        if ctx.with_entropy:
            has_gradient = has_gradient | (entropy_gradient != 0)
        own = weight[: ctx.num_ids]
        hidden_gradient = torch.zeros_like(hidden)
        # Chunks are summed in float32, whatever the weight's type.
        weight_gradient = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        for rows in used[has_gradient[used]].split(ctx.chunk_tokens):
            inputs = hidden.index_select(0, rows)
            log_p = _logits(inputs, own, ctx.temperature).sub_(normalisers[rows][:, None])
            g = logprob_gradient[rows][:, None]
            if ctx.with_entropy:
                g_entropy = entropy_gradient[rows][:, None]
                change = log_p.exp() * (-g - g_entropy * (log_p + entropy[rows][:, None]))
            else:
                change = log_p.exp_().mul_(-g)
            ids, is_own = _own_labels(local_labels[rows], ctx.num_ids)
            if ctx.num_ids:
                change.scatter_add_(1, ids, g * is_own)
            change = change.div_(ctx.temperature).to(weight.dtype)
            hidden_gradient.index_copy_(0, rows, change @ own)
            if ctx.needs_input_grad[1]:
                _add_product(weight_gradient[: ctx.num_ids], change, inputs)
            del log_p, change  # not beside the next chunk's
        answer = weight_gradient.to(weight.dtype) if ctx.needs_input_grad[1] else None
        return hidden_gradient, answer, *[None] * 8


def _logits(hidden: torch.Tensor, weight: torch.Tensor, temperature: float) -> torch.Tensor:
    """[tokens, ids] float32, a tensor of its own."""
    logits = F.linear(hidden, weight).float()
    return logits if temperature == 1.0 else logits.div_(temperature)


def _own_labels(local_labels: torch.Tensor, num_ids: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels as columns [tokens, 1] of the shard, and whether they are in it."""
    is_own = (local_labels >= 0) & (local_labels < num_ids)
    return local_labels.where(is_own, 0)[:, None], is_own[:, None]


def _shard_sums(
    logits: torch.Tensor, local_labels: torch.Tensor, with_entropy: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Per token of a chunk, over this shard: max m, sum exp(l - m), l_y - m, sum exp(l - m)(l - m).

    The last is zero where it is not asked for, the label's where the label is another rank's.
    """
    num_tokens, num_ids = logits.shape
    zeros = logits.new_zeros(num_tokens)
    if num_ids == 0:
        return zeros + NO_LOGIT, zeros, zeros, zeros
    largest = logits.amax(dim=-1)
    logits.sub_(largest[:, None])
    ids, is_own = _own_labels(local_labels, num_ids)
    targets = (logits.gather(1, ids) * is_own)[:, 0]
    if with_entropy:
        weights = logits.exp()
        return largest, weights.sum(-1), targets, (weights * logits).sum(-1)
    return largest, logits.exp_().sum(-1), targets, zeros


def _over_ranks(
    largest: torch.Tensor,
    sums: torch.Tensor,
    targets: torch.Tensor,
    moments: torch.Tensor,
    is_own: torch.Tensor,
    group: Group,
) -> tuple[torch.Tensor, ...]:
    """The shards' sums, each made relative to the largest logit of all ranks, added up."""
    shard_largest = largest
    largest = shard_largest.clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group.process_group)
    shift = shard_largest - largest
    scale = shift.exp()
    targets = torch.where(is_own, targets + shift, 0.0)
    total = torch.stack([sums * scale, targets, (moments + shift * sums) * scale])
    dist.all_reduce(total, group=group.process_group)
    return largest, *total.unbind()


def _add_product(total: torch.Tensor, change: torch.Tensor, inputs: torch.Tensor) -> None:
    """Add change^T inputs to a float32 total."""
    if total.dtype == change.dtype:
        total.addmm_(change.t(), inputs)
    else:
        total.add_(change.t() @ inputs)
