"""Logprobs by hand, against torch's log_softmax, and in little memory.

One rank here; several are covered by tests/distributed/test_model_layouts.py.
"""

import math

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_sr1.model.logprobs import label_logprobs, vocabulary_rows
from megatron_sr1.runtime.device import select_device, start_distributed
from megatron_sr1.runtime.groups import Group

WIDTH, IDS, TOKENS = 8, 11, 23


@pytest.fixture(scope="module")
def group():
    start_distributed(select_device("cpu"))
    return Group.of(dist.group.WORLD)


def inputs(num_rows=IDS, dtype=torch.float32):
    torch.manual_seed(1)
    hidden = torch.randn(TOKENS, 1, WIDTH).to(dtype).requires_grad_()
    weight = torch.randn(num_rows, WIDTH).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(0, IDS, (1, TOKENS))


def expected_values(hidden, weight, labels, temperature):
    log_p = ((hidden[:, 0] @ weight[:IDS].t()) / temperature).log_softmax(-1)
    return log_p.gather(1, labels[0][:, None]).t()


def test_two_ids_with_odds_of_three_to_one(group):
    hidden = torch.tensor([[[1.0]]], requires_grad=True)
    weight = torch.tensor([[math.log(3.0)], [0.0]], requires_grad=True)
    logprobs = label_logprobs(hidden, weight, torch.tensor([[0]]), group=group, vocab_size=2)
    assert logprobs.item() == pytest.approx(math.log(0.75))
    logprobs.sum().backward()
    assert weight.grad.flatten().tolist() == pytest.approx([0.25, -0.25])
    assert hidden.grad.item() == pytest.approx(0.25 * math.log(3.0))


@pytest.mark.parametrize("chunk_tokens", [1, 5, 23, 1000])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_values_and_gradients_equal_log_softmax(group, chunk_tokens, temperature):
    token_weights = torch.arange(TOKENS).remainder(3).float()[None]  # every third has none
    results = []
    for ours in (True, False):
        hidden, weight, labels = inputs()
        if ours:
            logprobs = label_logprobs(
                hidden, weight, labels, group=group, vocab_size=IDS, temperature=temperature,
                chunk_tokens=chunk_tokens,
            )  # fmt: skip
        else:
            logprobs = expected_values(hidden, weight, labels, temperature)
        (logprobs * token_weights).sum().backward()
        results.append((logprobs.detach(), hidden.grad, weight.grad))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("chunk_tokens", [2, 1000])
@pytest.mark.parametrize("places", [[], [0, 3, 4, TOKENS - 1]])
def test_tokens_that_are_not_wanted_have_no_logits_and_no_gradient(group, chunk_tokens, places):
    wanted = torch.zeros(1, TOKENS, dtype=torch.bool)
    wanted[0, places] = True
    hidden, weight, labels = inputs()
    with _LargestTensor() as seen:
        logprobs = label_logprobs(
            hidden, weight, labels, group=group, vocab_size=IDS, wanted=wanted,
            chunk_tokens=chunk_tokens,
        )  # fmt: skip
        (2 * logprobs).sum().backward()
    assert seen.numel == max(weight.numel(), hidden.numel(), len(places) * IDS)
    again = inputs()
    expected = expected_values(*again, 1.0)
    (2 * expected * wanted).sum().backward()
    torch.testing.assert_close(logprobs, expected * wanted)
    torch.testing.assert_close(hidden.grad, again[0].grad)
    torch.testing.assert_close(weight.grad, again[1].grad)


def test_padding_rows_of_the_vocabulary_have_no_probability_and_no_gradient(group):
    hidden, weight, labels = inputs(num_rows=IDS + 3)
    logprobs = label_logprobs(hidden, weight, labels, group=group, vocab_size=IDS)
    expected = expected_values(hidden, weight, labels, 1.0)
    torch.testing.assert_close(logprobs, expected)
    logprobs.sum().backward()
    assert weight.grad[IDS:].abs().max() == 0
    assert weight.grad[:IDS].abs().max() > 0


def test_a_frozen_output_layer_still_passes_gradients_on(group):
    hidden, weight, labels = inputs()
    logprobs = label_logprobs(hidden, weight.detach(), labels, group=group, vocab_size=IDS)
    logprobs.sum().backward()
    expected = expected_values(*(again := inputs()), 1.0)
    expected.sum().backward()
    torch.testing.assert_close(hidden.grad, again[0].grad)


def test_bfloat16_weights_give_float32_logprobs_near_the_exact_ones(group):
    hidden, weight, labels = inputs(dtype=torch.bfloat16)
    logprobs = label_logprobs(hidden, weight, labels, group=group, vocab_size=IDS)
    exact = expected_values(hidden.float(), weight.float(), labels, 1.0)
    logprobs.sum().backward()
    assert logprobs.dtype == torch.float32 and weight.grad.dtype == torch.bfloat16
    assert (logprobs - exact).abs().max() < 0.1


class _LargestTensor(TorchDispatchMode):
    """Records the size of the largest tensor that any operation returned."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


def test_logits_of_the_whole_row_never_exist(group):
    tokens, ids, chunk = 512, 1000, 32
    hidden = torch.randn(tokens, 1, WIDTH, requires_grad=True)
    weight = torch.randn(ids, WIDTH, requires_grad=True)
    labels = torch.randint(0, ids, (1, tokens))
    with _LargestTensor() as seen:
        logprobs = label_logprobs(
            hidden, weight, labels, group=group, vocab_size=ids, chunk_tokens=chunk
        )
        logprobs.sum().backward()
    assert seen.numel == chunk * ids


@pytest.mark.parametrize(("rank", "expected"), [(0, (0, 2)), (1, (2, 2)), (2, (4, 1)), (3, (6, 0))])
def test_ids_end_inside_a_shard_and_a_shard_can_be_all_padding(rank, expected):
    assert vocabulary_rows(5, 2, rank) == expected
