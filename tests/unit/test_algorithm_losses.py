"""Losses and gradients against values computed by hand: clips, KL, masks, micro-batches."""

import math

import pytest
import torch

from megatron_sr1.algorithm import losses
from megatron_sr1.algorithm.losses import k3_divergence, sft_loss
from megatron_sr1.config.training import AlgorithmConfig
from megatron_sr1.records import PackedBatch

CLIP = {"clip_low": 0.2, "clip_high": 0.3, "dual_clip": 3.0}


def policy_loss(policy, old, advantages, mask, *, reference=None, kl_coefficient=0.0):
    """Return the sum over tokens and what is reported, for a row that is one sequence."""
    nothing = torch.zeros(mask.shape, dtype=torch.int64)
    batch = PackedBatch(
        sample_ids=(0,),
        input_ids=nothing,
        labels=nothing,
        loss_mask=mask,
        position_ids=nothing.expand(3, 1, -1),
        cu_seqlens=torch.tensor([0, mask.numel()], dtype=torch.int32),
        advantages=advantages,
        reference_logprobs=reference,
    )
    algorithm = AlgorithmConfig(loss="token_mean", kl_coefficient=kl_coefficient, **CLIP)
    loss, denominator, reported = losses.policy_loss(policy, old, batch, algorithm, 64)
    assert denominator == mask.sum()
    return loss, reported


def one_token(ratio, advantage):
    """Return loss, gradient by the policy logprob, and reported sums, for one target token."""
    policy = torch.tensor([[math.log(ratio) - 1.0]], requires_grad=True)
    old, ones = torch.tensor([[-1.0]]), torch.ones(1, 1)
    loss, reported = policy_loss(policy, old, ones * advantage, ones)
    loss.backward()
    return loss.item(), policy.grad.item(), {k: v.item() for k, v in reported.items()}


# The derivative of the ratio by the logprob is the ratio; a clipped token has no gradient.
@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "clipped", "dual_clipped"),
    [
        (1.0, 2.0, -2.0, -2.0, 0, 0),
        (1.0, -2.0, 2.0, 2.0, 0, 0),
        (1.25, 2.0, -2.5, -2.5, 0, 0),  # between 1.2 and 1.3: the two limits differ
        (1.5, 2.0, -2.6, 0.0, 1, 0),  # no further gain above 1.3
        (0.5, 2.0, -1.0, -1.0, 0, 0),  # a good token below the limit keeps its gradient
        (0.85, -2.0, 1.7, 1.7, 0, 0),  # above 0.8: 1 - 0.2, not 1 - 0.3
        (0.5, -2.0, 1.6, 0.0, 1, 0),  # no further loss below 0.8
        (1.5, -2.0, 3.0, 3.0, 0, 0),  # a bad token above the limit keeps its gradient,
        (2.9, -2.0, 5.8, 5.8, 0, 0),
        (3.5, -2.0, 6.0, 0.0, 0, 1),  # but not above the dual clip,
        (3.5, 2.0, -2.6, 0.0, 1, 0),  # which does not apply to good tokens
        (1.0, 0.0, 0.0, 0.0, 0, 0),
    ],
)
def test_loss_and_gradient_of_a_token(ratio, advantage, loss, gradient, clipped, dual_clipped):
    got, grad, reported = one_token(ratio, advantage)
    assert got == pytest.approx(loss, rel=1e-5, abs=1e-7)
    assert grad == pytest.approx(gradient, rel=1e-5, abs=1e-7)
    assert reported["clipped_share"] == clipped
    assert reported["dual_clipped_share"] == dual_clipped
    assert reported["ratio_max"] == pytest.approx(ratio, rel=1e-5)
    assert reported["old_kl"] == pytest.approx(-math.log(ratio), abs=1e-6)
    assert reported["entropy"] == pytest.approx(1 - math.log(ratio), abs=1e-6)


@pytest.mark.parametrize("gap", [-1.5, -0.1, 0.0, 0.1, 1.5])
def test_kl_to_the_reference_is_k3_with_its_gradient(gap):
    policy = torch.tensor([[-2.0]], requires_grad=True)
    reference = torch.tensor([[-2.0 + gap]])
    ones = torch.ones(1, 1)
    loss, reported = policy_loss(
        policy, policy.detach(), 0 * ones, ones, reference=reference, kl_coefficient=0.5
    )
    loss.backward()
    k3 = math.exp(gap) - gap - 1
    assert loss.item() == pytest.approx(0.5 * k3, abs=1e-6)
    assert reported["reference_kl"].item() == pytest.approx(k3, abs=1e-6)
    # d/d policy of exp(r - p) - (r - p) - 1 is 1 - exp(r - p)
    assert policy.grad.item() == pytest.approx(0.5 * (1 - math.exp(gap)), abs=1e-6)


def test_k3_is_clamped_for_large_differences():
    policy = torch.tensor([-60.0, -5.0], requires_grad=True)
    value = k3_divergence(policy, torch.tensor([-0.1, -0.1]))
    value.sum().backward()
    assert value.tolist() == [10.0, 10.0]
    assert policy.grad.tolist() == [0.0, 0.0]


def test_the_mean_of_k3_over_policy_samples_is_the_divergence():
    torch.manual_seed(0)
    policy, reference = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.5, 0.2, 0.3])
    drawn = torch.multinomial(policy, 200_000, replacement=True)
    estimate = k3_divergence(policy[drawn].log(), reference[drawn].log()).mean()
    exact = (policy * (policy / reference).log()).sum()
    assert estimate.item() == pytest.approx(exact.item(), rel=0.02)


def row(tokens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda: torch.randn(1, tokens, generator=generator)  # noqa: E731
    policy = (0.5 * draw() - 2).requires_grad_()
    old, reference, advantages = policy.detach() + 0.3 * draw(), 0.5 * draw() - 2, draw()
    mask = (torch.rand(1, tokens, generator=generator) < 0.6).float()
    return policy, old, advantages, mask, reference


def full_loss(policy, old, advantages, mask, reference):
    return policy_loss(policy, old, advantages, mask, reference=reference, kl_coefficient=0.1)


def test_the_mean_entropy_over_policy_samples_is_the_policys():
    torch.manual_seed(0)
    policy = torch.tensor([0.7, 0.2, 0.1])
    logprobs = policy.log()[torch.multinomial(policy, 200_000, replacement=True)][None]
    ones = torch.ones_like(logprobs)
    _, reported = policy_loss(logprobs, logprobs, 0 * ones, ones)
    exact = -(policy * policy.log()).sum()
    assert reported["entropy"].item() / logprobs.numel() == pytest.approx(exact.item(), rel=0.02)


def test_micro_batches_of_any_size_add_up_to_the_whole():
    whole = row(50)
    loss, reported = full_loss(*whole)
    loss.backward()
    gradient = whole[0].grad.clone()
    whole[0].grad = None
    parts = [full_loss(*(t[:, a:b] for t in whole)) for a, b in ((0, 3), (3, 30), (30, 50))]
    sum(part[0] for part in parts).backward()
    torch.testing.assert_close(sum(part[0] for part in parts), loss)
    torch.testing.assert_close(whole[0].grad, gradient)
    for name, value in reported.items():
        join = max if name == "ratio_max" else sum
        torch.testing.assert_close(join(p[1][name] for p in parts).float(), value.float())


def test_all_target_tokens_weigh_the_same_and_others_nothing():
    policy, old, advantages, mask, reference = row(20)
    full_loss(policy, old, advantages, mask, reference)[0].backward()
    for token in range(20):
        only = torch.zeros_like(mask)
        only[0, token] = mask[0, token]
        alone = policy.detach().clone().requires_grad_()
        full_loss(alone, old, advantages, only, reference)[0].backward()
        torch.testing.assert_close(alone.grad[0, token], policy.grad[0, token])
        assert mask[0, token] == 1 or policy.grad[0, token] == 0


@pytest.mark.parametrize("poison", [math.inf, -math.inf, math.nan])
def test_values_outside_the_targets_affect_neither_loss_nor_gradient(poison):
    clean, dirty = row(20), row(20)
    outside = clean[3] == 0
    with torch.no_grad():
        for tensor in (*dirty[:3], dirty[4]):
            tensor[outside] = poison
    loss, reported = full_loss(*clean)
    dirty_loss, dirty_reported = full_loss(*dirty)
    loss.backward()
    dirty_loss.backward()
    assert dirty_loss == loss and dirty_reported == reported
    assert torch.equal(clean[0].grad, dirty[0].grad)


def test_a_batch_without_targets_has_zero_loss_and_gradient():
    policy, old, advantages, mask, reference = row(9)
    loss, reported = full_loss(policy, old, advantages, 0 * mask, reference)
    (loss + sft_loss(policy, 0 * mask)).backward()
    assert loss.item() == 0 and not policy.grad.any()
    assert all(value.item() == 0 for value in reported.values())


def test_a_ratio_beyond_the_range_of_float32_stays_finite():
    for gap in (200.0, -200.0):
        for advantage in (1.0, -1.0):
            policy = torch.tensor([[gap]], requires_grad=True)
            zeros, ones = torch.zeros(1, 1), torch.ones(1, 1)
            loss, reported = policy_loss(policy, zeros, advantage * ones, ones)
            loss.backward()
            assert math.isfinite(loss.item()) and math.isfinite(policy.grad.item())
            assert math.isfinite(reported["ratio_max"].item())


def test_reported_sums_carry_no_gradient():
    _, reported = full_loss(*row(9))
    assert not any(value.requires_grad for value in reported.values())


@pytest.mark.parametrize("poison", [-3.0, -math.inf, math.nan])
def test_sft_loss_is_the_negative_log_likelihood_of_the_targets(poison):
    policy = torch.tensor([[-1.0, -0.5, poison, -0.25]], requires_grad=True)
    loss = sft_loss(policy, torch.tensor([[1.0, 0.0, 0.0, 1.0]]))
    loss.backward()
    assert loss.item() == 1.25
    assert policy.grad.tolist() == [[-1.0, 0.0, 0.0, -1.0]]
