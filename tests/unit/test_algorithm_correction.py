"""The mismatch of engine and actor against values computed by hand."""

import math

import pytest
import torch

from megatron_sr1.algorithm.correction import mismatch_sums, truncated_importance_weights

ENGINE = torch.tensor([[-1.0, -2.0, -0.5, math.nan, math.inf]])
ACTOR = torch.tensor([[-1.2, -2.0, -0.45, -1.0, -1.0]])
MASK = torch.tensor([[1.0, 1.0, 1.0, 0.0, 0.0]])


def test_the_mismatch_is_summed_over_target_tokens_only():
    sums = {name: value.item() for name, value in mismatch_sums(ENGINE, ACTOR, MASK).items()}
    # engine - actor: 0.2, 0, -0.05
    assert sums["mismatch/k1"] == pytest.approx(0.15, abs=1e-6)
    k3 = (math.exp(-0.2) + 0.2 - 1) + (math.exp(0.05) - 0.05 - 1)
    assert sums["mismatch/kl"] == pytest.approx(k3, abs=1e-6)
    assert sums["mismatch/far_share"] == 1
    assert sums["mismatch/abs_max"] == pytest.approx(0.2, abs=1e-6)


def test_the_mismatch_is_zero_without_targets():
    sums = mismatch_sums(ENGINE, ACTOR, 0 * MASK)
    assert all(value.item() == 0 for value in sums.values())


def test_mismatch_sums_carry_no_gradient():
    actor = ACTOR.clone().requires_grad_()
    assert not any(v.requires_grad for v in mismatch_sums(ENGINE, actor, MASK).values())


def test_importance_weights_are_the_ratio_up_to_the_cap_and_1_elsewhere():
    engine = torch.tensor([[-1.0, -3.0, -1.0, math.nan]])
    old = torch.tensor([[-1.5, -1.0, -1.0, -1.0]], requires_grad=True)
    weights = truncated_importance_weights(engine, old, torch.tensor([[1.0, 1.0, 1.0, 0.0]]), 2.0)
    expected = torch.tensor([[math.exp(-0.5), 2.0, 1.0, 1.0]])
    torch.testing.assert_close(weights, expected)
    assert not weights.requires_grad


def test_weighted_samples_of_the_engine_estimate_an_expectation_under_the_actor():
    torch.manual_seed(0)
    engine, actor = torch.tensor([0.6, 0.3, 0.1]), torch.tensor([0.5, 0.35, 0.15])
    value = torch.tensor([1.0, 2.0, 5.0])
    drawn = torch.multinomial(engine, 200_000, replacement=True)[None]
    weights = truncated_importance_weights(
        engine[drawn].log(), actor[drawn].log(), torch.ones(drawn.shape), 5.0
    )
    estimate = (weights * value[drawn]).mean()
    assert estimate.item() == pytest.approx((actor * value).sum().item(), rel=0.02)
    assert value[drawn].mean().item() != pytest.approx((actor * value).sum().item(), rel=0.02)
