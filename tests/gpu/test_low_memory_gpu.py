"""Optimizer state in bfloat16 and in pinned host memory, on CUDA."""

import pytest
import torch

from tests.unit.test_adamw import BF16, F32, gradients, shard_adamw, start, train, train_torch

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_offloaded_state_is_pinned_and_gives_the_same_bitwise(dtype):
    kept, sent = start().to("cuda", BF16), start().to("cuda", BF16)
    steps = [gradient.cuda() for gradient in gradients(20)]
    state = train(shard_adamw(kept, dtype), steps)
    other = train(shard_adamw(sent, dtype, offload=True), steps)
    assert torch.equal(kept, sent)
    for name, held in state.items():
        assert held.is_cuda and other[name].is_pinned()
        assert torch.equal(held.cpu(), other[name])


@pytest.mark.parametrize("gradient_dtype", [F32, BF16])
def test_the_kernel_with_compensation_follows_float32(gradient_dtype):
    steps = gradients(200)
    expected = train_torch(start(), steps, lr=1e-6).double()
    weights = start().to("cuda", BF16)
    state = train(shard_adamw(weights, BF16), [g.to("cuda", gradient_dtype) for g in steps])
    master = (weights.double() + state["master_param"].double()).cpu()
    moved = (expected - start().double()).abs().mean()
    assert (master - expected).abs().mean() < 0.02 * moved
