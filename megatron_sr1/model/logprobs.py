"""Logprobs of labels from hidden states, over a vocabulary split across ranks.

Logits exist for one chunk of tokens at a time and are computed again in the backward pass: those of
wanted tokens only, and there of those with a gradient. Prompts and images cost nothing.

With l the logits over the temperature and p = softmax(l), d logprob(y) / d l_j = [j = y] - p_j.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region

from megatron_sr1.runtime.groups import Group


def vocabulary_rows(vocab_size: int, num_rows: int, rank: int) -> tuple[int, int]:
    """Return the first id of a rank's shard of `num_rows` rows, and how many are not padding."""
    first = rank * num_rows
    return first, min(max(vocab_size - first, 0), num_rows)


def full_logits(
    hidden: torch.Tensor, weight: torch.Tensor, group: Group, vocab_size: int
) -> torch.Tensor:
    """Return all logits of a row, [1, T, vocab_size] float32, equal on all ranks of the group.

    For tools and tests; arguments are those of `label_logprobs`.
    """
    shard = F.linear(hidden, weight).float()
    logits = gather_from_tensor_model_parallel_region(shard, group=group.process_group)
    return logits[..., :vocab_size].transpose(0, 1)


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
) -> torch.Tensor:
    """Return the logprob of each token's label under softmax(logits / temperature).

    Args:
        hidden: [T, 1, width].
        weight: [rows, width], this rank's shard of the output layer; padding rows come last.
        labels: [1, T] int64.
        group: tensor-parallel ranks.
        vocab_size: number of ids, without padding.
        wanted: [1, T] bool, the tokens to compute; None for all.
        temperature: > 0.
        chunk_tokens: tokens whose logits exist at a time.

    Returns:
        [1, T] float32 nats, equal on all ranks; 0 at tokens that are not wanted.
    """
    rows, tokens = hidden.shape[0], labels.numel()
    assert rows == tokens, f"{rows} hidden states and {tokens} labels"
    first, num_ids = vocabulary_rows(vocab_size, weight.shape[0], group.rank)
    used = torch.nonzero(torch.ones_like(labels[0]) if wanted is None else wanted[0])[:, 0]
    values = _LabelLogprobs.apply(
        hidden[:, 0].index_select(0, used), weight, labels[0, used] - first, num_ids, group,
        temperature, chunk_tokens,
    )  # fmt: skip
    return values.new_zeros(tokens).index_copy(0, used, values)[None]


class _LabelLogprobs(torch.autograd.Function):
    """Logprobs of one rank's shard; the caller sums gradients over the ranks.

    Labels are relative to the shard's first id; its first `num_ids` rows are not padding.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        num_ids: int,
        group: Group,
        temperature: float,
        chunk_tokens: int,
    ) -> torch.Tensor:
        own = weight[:num_ids]
        chunks = zip(hidden.split(chunk_tokens), labels.split(chunk_tokens), strict=True)
        parts = [_shard_sums(_logits(h, own, temperature), ids) for h, ids in chunks]
        shard_largest, sums, targets = (torch.cat(column) for column in zip(*parts, strict=True))
        # Shift each shard's sums to the largest logit of all ranks, then add them up.
        largest = shard_largest.clone()
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group.process_group)
        shift = shard_largest - largest
        is_own = _own_labels(labels, num_ids)[1][:, 0]
        total = torch.stack([sums * shift.exp(), torch.where(is_own, targets + shift, 0.0)])
        dist.all_reduce(total, group=group.process_group)
        log_sums = total[0].log()
        ctx.save_for_backward(hidden, weight, labels, largest + log_sums)
        ctx.num_ids, ctx.temperature, ctx.chunk_tokens = num_ids, temperature, chunk_tokens
        return total[1] - log_sums

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        hidden, weight, labels, normalisers = ctx.saved_tensors
        (gradient,) = gradients
        own = weight[: ctx.num_ids]
        hidden_gradient = torch.zeros_like(hidden)
        # Chunks are summed in float32, whatever the weight's dtype; a frozen weight has no sum.
        num_rows = len(weight) if ctx.needs_input_grad[1] else 0
        weight_gradient = hidden.new_zeros(num_rows, weight.shape[1], dtype=torch.float32)
        own_gradient = weight_gradient[: ctx.num_ids]
        for rows in gradient.nonzero()[:, 0].split(ctx.chunk_tokens):
            inputs, g = hidden.index_select(0, rows), gradient[rows][:, None]
            log_p = _logits(inputs, own, ctx.temperature).sub_(normalisers[rows][:, None])
            change = log_p.exp_().mul_(-g)
            ids, is_own = _own_labels(labels[rows], ctx.num_ids)
            change.scatter_add_(1, ids, g * is_own)
            change = change.div_(ctx.temperature).to(weight.dtype)
            hidden_gradient.index_copy_(0, rows, change @ own)
            if ctx.needs_input_grad[1] and change.dtype == torch.float32:
                own_gradient.addmm_(change.t(), inputs)
            elif ctx.needs_input_grad[1]:
                own_gradient.add_(change.t() @ inputs)
            del log_p, change  # before the next chunk's are allocated
        answer = weight_gradient.to(weight.dtype) if ctx.needs_input_grad[1] else None
        return hidden_gradient, answer, *[None] * 5


def _logits(hidden: torch.Tensor, weight: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return the logits [tokens, ids] float32, in a tensor of their own."""
    logits = F.linear(hidden, weight).float()
    return logits if temperature == 1.0 else logits.div_(temperature)


def _own_labels(labels: torch.Tensor, num_ids: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return labels as columns [tokens, 1] of the shard, and whether they are in it."""
    is_own = (labels >= 0) & (labels < num_ids)
    return labels.where(is_own, 0)[:, None], is_own[:, None]


def _shard_sums(
    logits: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return each token's max m, sum exp(l - m), and l_y - m, 0 if y is in another rank's shard."""
    largest = logits.amax(dim=-1)
    logits.sub_(largest[:, None])
    ids, is_own = _own_labels(labels, logits.shape[1])
    targets = (logits.gather(1, ids) * is_own)[:, 0]
    return largest, logits.exp_().sum(-1), targets
