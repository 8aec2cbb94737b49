"""Our attention over packed rows with SDPA: numbers, time, and which kernels torch chooses.

Beside the shapes of the language model and of the tower's windows and whole images (heads of 80
channels) there is a masked call with fewer key/value heads than queries, as in a row that is split
over context-parallel ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F

from megatron_sr1.gpu_checks.bench import Bench
from megatron_sr1.gpu_checks.kernels import names
from megatron_sr1.gpu_checks.numerics import gap
from megatron_sr1.gpu_checks.rows import Row, at_least, at_most, fact
from megatron_sr1.model.attention import attend, plan_attention
from megatron_sr1.model.flops import ATTENTION_BACKWARD
from megatron_sr1.model.row_split import split_row

BF16_LIMIT = 2e-2
PEAK_SHARE = 0.1
"""Least share of a bfloat16 product's rate. FlashAttention-2 reaches a third of it on Hopper; a
kernel that writes all scores stays far below a tenth."""
Operands = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def packed_rows(bench: Bench) -> Iterator[Row]:
    """Compare with float32 scores, sequence by sequence, forward and backward."""
    text, vision = bench.hf_config.text, bench.hf_config.vision
    height, width = bench.sizes.grid
    window = (vision.window_units * vision.spatial_merge_size) ** 2
    long = bench.sizes.pack_tokens
    lengths = [long // 2, long // 2 - 7, long // 4, long // 8 + 3]
    text_heads, kv_heads = text.num_attention_heads, text.num_key_value_heads
    towers = vision.num_heads, vision.num_heads, vision.head_dim
    shapes: dict[str, tuple[int, int, int, list[int], bool]] = {
        "text": (text_heads, kv_heads, text.head_dim, lengths, True),
        "tower, windows": (*towers, [window] * 64, False),
        "tower, images": (*towers, [height * width] * 6, False),
    }
    for name, (heads, kv_heads, channels, sequences, is_causal) in shapes.items():
        operands = _operands(bench, heads, kv_heads, channels, sum(sequences))
        borders = torch.tensor([0, *sequences], device=bench.device).cumsum(0).int()
        plan = plan_attention(split_row(borders), is_causal=is_causal)

        ours = partial(attend, plan=plan)
        expected = partial(by_sequence, borders=borders.tolist(), causal=is_causal)
        pairs = sum(n * n * (0.5 if is_causal else 1) for n in sequences)
        work = 4 * pairs * heads * channels * (1 + ATTENTION_BACKWARD)
        is_fast = min(sequences) > window  # short windows have few operations for each byte
        yield from _compared(bench, name, ours, expected, operands, work, is_fast)
    yield from _masked(bench)


def _masked(bench: Bench) -> Iterator[Row]:
    """Compare a masked call with grouped key/value heads, as for a context-parallel chunk."""
    text, keys = bench.hf_config.text, bench.sizes.pack_tokens // 2
    queries = keys // 2
    operands = _operands(
        bench, text.num_attention_heads, text.num_key_value_heads, text.head_dim, keys
    )
    mask = torch.ones(queries, keys, dtype=torch.bool, device=bench.device).tril(keys - queries)

    def ours(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (t[None].transpose(1, 2) for t in (q[-queries:], k, v))
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return found.transpose(1, 2)[0].flatten(1)

    def expected(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return scores_softmax(q, k, v, causal=True)[-queries:].flatten(1)

    pairs = queries * (keys - queries / 2)
    work = 4 * pairs * text.num_attention_heads * text.head_dim * (1 + ATTENTION_BACKWARD)
    name = "text, masked (parallel.context > 1)"
    yield from _compared(bench, name, ours, expected, operands, work, is_fast=False)


def _compared(
    bench: Bench,
    name: str,
    ours: Callable[..., torch.Tensor],
    expected: Callable[..., torch.Tensor],
    operands: Operands,
    work: float,
    is_fast: bool,
) -> Iterator[Row]:
    """Compare result and gradients in bfloat16 with `expected` in float32; measure the time."""

    def run(function: Callable[..., torch.Tensor], values: Operands) -> list[torch.Tensor]:
        result = function(*values)
        # Equal weights of all outputs would hide errors: scores would have no gradient.
        given = weights[: result.numel()].view_as(result).to(result.dtype)
        return [result, *torch.autograd.grad(result, values, given)]

    generator = torch.Generator(bench.device).manual_seed(5)
    weights = torch.randn(operands[0].numel(), device=bench.device, generator=generator)
    q, k, v = (t.bfloat16() for t in operands)
    low = q.requires_grad_(), k.requires_grad_(), v.requires_grad_()
    q, k, v = (t.detach().float() for t in low)
    high = q.requires_grad_(), k.requires_grad_(), v.requires_grad_()
    gaps = [gap(a, b) for a, b in zip(run(ours, low), run(expected, high), strict=True)]
    wrong = "torch's SDPA or our packing is wrong on this GPU: do not train; report the versions"
    yield at_most(f"{name}: result", gaps[0], BF16_LIMIT, wrong)
    yield at_most(f"{name}: gradients", max(gaps[1:]), BF16_LIMIT, wrong)
    seconds = bench.seconds(lambda: run(ours, low), calls=3)
    note = f"{1000 * seconds:.3g} ms; {names(lambda: run(ours, low), bench.kind, 'attention')}"
    rate, title = work / seconds / 1e12, f"{name}: forward and backward"
    product = bench.known.get("matmul_rate")
    if not (is_fast and product and bench.kind == "cuda"):
        yield fact(title, rate, "TFLOP/s", note)
        return
    slow = "SDPA has no fused kernel for this shape and computes all scores"
    yield at_least(title, rate, PEAK_SHARE * product / 1e12, slow, "TFLOP/s", note)


def by_sequence(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, borders: Sequence[int], causal: bool
) -> torch.Tensor:
    """Attend within each sequence of a row, one after the other: [tokens, heads * width]."""
    spans = pairwise(borders)
    parts = [scores_softmax(q[a:b], k[a:b], v[a:b], causal) for a, b in spans]
    return torch.cat(parts).flatten(1)


def scores_softmax(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    """Attention from its definition: [tokens, heads, width] each, k and v with fewer heads."""
    repeats = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(repeats, dim=1) for t in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
    if causal:
        ahead = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(ahead, float("-inf"))
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)


def _operands(bench: Bench, heads: int, kv_heads: int, width: int, tokens: int) -> Operands:
    generator = torch.Generator(bench.device).manual_seed(4)

    def draw(number: int) -> torch.Tensor:
        return torch.randn(tokens, number, width, device=bench.device, generator=generator)

    return draw(heads), draw(kv_heads), draw(kv_heads)
