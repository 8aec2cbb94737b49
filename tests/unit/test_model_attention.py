"""Attention over packed rows against softmax written out, sequence by sequence."""

import pytest
import torch

from megatron_sr1.model.attention import MIN_FILL, attend, pack_row, plan_attention

RAGGED = [5, 60, 1, 17, 60, 33, 200, 58]


def written_out(query, key, value, lengths, is_causal):
    """Each sequence's attention by its definition, in the types of its arguments."""
    results, start = [], 0
    repeats = query.shape[1] // key.shape[1]
    for n in lengths:
        q, k, v = (t[start : start + n].transpose(0, 1) for t in (query, key, value))
        k, v = k.repeat_interleave(repeats, 0), v.repeat_interleave(repeats, 0)
        scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
        if is_causal:
            hidden = torch.ones(n, n, dtype=torch.bool).triu(1)
            scores = scores.masked_fill(hidden, float("-inf"))
        results.append((scores.softmax(-1) @ v).transpose(0, 1).flatten(1))
        start += n
    return torch.cat(results)


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("lengths", [RAGGED, [12] * 5, [7], [3, 0, 3], [2, 90, 0, 91]])
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_packed_attention_and_its_gradients_equal_each_sequence_alone(lengths, is_causal, kv_heads):
    torch.manual_seed(0)
    total = sum(lengths)
    tensors = [torch.randn(total, heads, 16) for heads in (4, kv_heads, kv_heads)]
    weights = torch.randn(total, 4 * 16)
    found, expected = [], []
    for store, function in (
        (found, lambda *t: attend(*t, plan_attention(lengths, is_causal=is_causal))),
        (expected, lambda *t: written_out(*t, lengths, is_causal)),
    ):
        inputs = [t.clone().requires_grad_() for t in tensors]
        result = function(*inputs)
        (result * weights).sum().backward()
        store += [result.detach(), *(t.grad for t in inputs)]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_sequences_of_like_length_share_a_batch_and_others_do_not():
    plan = plan_attention(RAGGED, is_causal=True)
    batches = sorted((b.num_sequences, b.length) for b in plan.batches)
    assert batches == [(1, 200), (3, 17), (4, 60)]


def test_padding_of_long_causal_sequences_stays_bounded():
    lengths = [4000, 3100, 2900, 1000]
    plan = plan_attention(lengths, is_causal=True)
    padded = sum(b.num_sequences * b.length for b in plan.batches)
    assert padded <= sum(lengths) / MIN_FILL
    assert len(plan.batches) == 3


def test_sequences_that_see_both_ways_are_never_padded():
    plan = plan_attention(RAGGED, is_causal=False)
    assert sum(b.num_sequences * b.length for b in plan.batches) == sum(RAGGED)


def test_equal_lengths_need_no_copies():
    plan = plan_attention([12] * 5, is_causal=True)
    assert plan.slots is None and plan.batches[0].rows is None


def test_a_row_longer_than_its_borders_is_refused():
    row = pack_row(torch.tensor([0, 3, 8], dtype=torch.int32), is_causal=True)
    tensors = [torch.randn(9, 2, 16)] * 3
    with pytest.raises(AssertionError, match="cu_seqlens end at 8"):
        attend(*tensors, row.plan)
