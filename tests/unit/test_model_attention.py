"""Attention over packed rows against softmax written out, sequence by sequence."""

import pytest
import torch

from megatron_sr1.errors import DataError
from megatron_sr1.model.attention import MIN_FILL, attend, pack_row, plan_attention
from megatron_sr1.model.row_split import split_row
from megatron_sr1.runtime.groups import Group

RAGGED = [5, 60, 1, 17, 60, 33, 200, 58]


def boundaries(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def plan_whole(lengths, *, is_causal):
    return plan_attention(split_row(boundaries(lengths)), is_causal=is_causal)


def shares_of(lengths, num_ranks):
    """Return each context-parallel rank's split of a row; ranks do not communicate here."""
    ranks = tuple(range(num_ranks))
    return [split_row(boundaries(lengths), Group(None, rank, num_ranks, ranks)) for rank in ranks]


def written_out(query, key, value, lengths, is_causal):
    """Compute each sequence's attention by its definition, in the dtypes of its arguments."""
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
        (found, lambda *t: attend(*t, plan_whole(lengths, is_causal=is_causal))),
        (expected, lambda *t: written_out(*t, lengths, is_causal)),
    ):
        inputs = [t.clone().requires_grad_() for t in tensors]
        result = function(*inputs)
        (result * weights).sum().backward()
        store += [result.detach(), *(t.grad for t in inputs)]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_only_sequences_of_similar_length_share_a_batch():
    plan = plan_whole(RAGGED, is_causal=True)
    batches = sorted((b.num_sequences, b.num_queries) for b in plan.batches)
    assert batches == [(1, 200), (2, 5), (2, 33), (3, 60)]


def test_sequences_that_share_a_prompt_are_not_padded_to_those_that_compute_one():
    lengths, shared = [44, 43, 40, 38, 38, 36], [0, 22, 22, 0, 22, 22]
    split = split_row(boundaries(lengths), shared_tokens=torch.tensor(shared))
    plan = plan_attention(split, is_causal=True)
    assert [(b.num_sequences, b.num_queries) for b in plan.batches] == [(2, 44), (4, 21)]


def test_padding_of_long_causal_sequences_stays_bounded():
    lengths = [4000, 3100, 2900, 1000]
    plan = plan_whole(lengths, is_causal=True)
    padded = len(plan.rows)
    assert padded <= sum(lengths) / MIN_FILL
    assert len(plan.batches) == 3


def test_bidirectional_sequences_are_never_padded():
    plan = plan_whole(RAGGED, is_causal=False)
    assert len(plan.rows) == sum(RAGGED)


def test_equal_lengths_need_no_copies():
    plan = plan_whole([12] * 5, is_causal=True)
    assert plan.rows is None


def test_a_row_longer_than_its_boundaries_is_refused():
    row = pack_row(split_row(boundaries([3, 5])), is_causal=True)
    tensors = [torch.randn(9, 2, 16)] * 3
    with pytest.raises(AssertionError, match="cu_seqlens end at 8"):
        attend(*tensors, row.plan)


@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("units", [[1, 20, 3, 20, 0, 50, 17], [4], [5, 5]])
def test_the_ranks_of_a_split_row_together_attend_as_one_does(num_ranks, kv_heads, units):
    torch.manual_seed(0)
    lengths = [2 * num_ranks * n for n in units]
    total = sum(lengths)
    tensors = [torch.randn(total, heads, 16) for heads in (4, kv_heads, kv_heads)]
    weights = torch.randn(total, 4 * 16)
    splits = shares_of(lengths, num_ranks)
    order = torch.cat([split.own for split in splits])

    def split_attention(query, key, value):
        results = []
        for split in splits:
            plan = plan_attention(split, is_causal=True)
            own = split.take(query, dim=0)
            assert len(own) == total // num_ranks
            results.append(attend(own, key[order], value[order], plan))
        return torch.cat(results)[splits[0].places]

    found, expected = [], []
    for store, function in (
        (found, split_attention),
        (expected, lambda *t: written_out(*t, lengths, True)),
    ):
        inputs = [t.clone().requires_grad_() for t in tensors]
        result = function(*inputs)
        (result * weights).sum().backward()
        store += [result.detach(), *(t.grad for t in inputs)]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_a_rank_holds_an_early_and_a_late_chunk_of_each_sequence():
    first, second = shares_of([4, 0, 8], 2)
    assert first.own.tolist() == [0, 3, 4, 5, 10, 11]
    assert second.own.tolist() == [1, 2, 6, 7, 8, 9]
    pairs = [
        sum(s.num_queries * s.num_keys - s.num_queries * (s.num_queries - 1) // 2 for s in segments)
        for segments in (first.segments, second.segments)
    ]
    assert pairs == [(4 * 5 + 8 * 9) // 4] * 2  # half of all pairs of a query and an earlier key


def test_sequences_that_do_not_divide_into_equal_chunks_are_refused():
    with pytest.raises(DataError, match="sequence of 6 tokens .* pad each sequence to a mult.* 4"):
        shares_of([8, 6], 2)


@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize(
    ("lengths", "shared"),
    [([9, 8, 12, 7], [0, 5, 5, 0]), ([90, 95, 3, 6, 5], [0, 80, 0, 0, 4]), ([4, 4], [0, 4])],
)
def test_shared_tokens_attend_once_and_get_every_sequences_gradient(lengths, shared, kv_heads):
    torch.manual_seed(0)
    split = split_row(boundaries(lengths), shared_tokens=torch.tensor(shared))
    num_own = sum(lengths) - sum(shared)
    assert split.own.shape == (num_own,) and split.places.shape == (sum(lengths),)
    tensors = [torch.randn(num_own, heads, 16) for heads in (4, kv_heads, kv_heads)]
    weights = torch.randn(sum(lengths), 4 * 16)
    found = [t.clone().requires_grad_() for t in tensors]
    result = split.spread(attend(*found, plan_attention(split, is_causal=True)))
    expected = [t.clone().requires_grad_() for t in tensors]
    whole = written_out(*(split.spread(t) for t in expected), lengths, True)
    for value in (result, whole):
        (value * weights).sum().backward()
    torch.testing.assert_close(result, whole, atol=1e-5, rtol=1e-5)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-5, rtol=1e-5)
