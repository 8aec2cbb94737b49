"""Advantages against values computed by hand."""

import numpy as np
import pytest
import torch

from megatron_sr1.algorithm.advantages import group_advantages, weighted_sum


def test_advantages_are_centred_and_divided_by_the_unbiased_standard_deviation():
    # mean 1, squares (1, 1, 0, 0), deviation sqrt(2 / 3)
    advantages, stats = group_advantages(np.array([[0.0, 2.0, 1.0, 1.0]]), 1e-2)
    assert advantages.dtype == np.float32
    expected = np.array([[-1.0, 1.0, 0.0, 0.0]]) / np.sqrt(2 / 3)
    np.testing.assert_allclose(advantages, expected, rtol=1e-6)
    assert stats["std"] == pytest.approx(np.sqrt(2 / 3))
    assert (stats["no_spread"], stats["floored"]) == (0.0, 0.0)


def test_each_group_is_normalised_on_its_own():
    totals = np.array([[0.0, 1.0], [100.0, 300.0]])
    advantages, _ = group_advantages(totals, 1e-2)
    row = np.array([-1.0, 1.0]) / np.sqrt(2)
    np.testing.assert_allclose(advantages, [row, row], rtol=1e-6)


def test_the_standard_deviation_equals_that_of_torch():
    totals = np.random.default_rng(0).random((5, 8))
    rewards = torch.tensor(totals)
    upstream = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-6)
    np.testing.assert_allclose(group_advantages(totals, 1e-2)[0], upstream, rtol=1e-4)


def test_a_group_of_equal_rewards_has_zero_advantages_and_is_counted():
    totals = np.array([[1.1, 1.1, 1.1], [0.0, 1.0, 2.0]])
    advantages, stats = group_advantages(totals, 1e-2)
    np.testing.assert_array_equal(advantages[0], 0.0)
    assert stats["no_spread"] == 0.5


def test_rewards_that_differ_only_by_rounding_count_as_equal():
    rounded = 0.9 + 0.1 + 1.0, 1.0 + 0.9 + 0.1, 2.0 + 2**-50
    advantages, stats = group_advantages(np.array([rounded]), 1e-2)
    np.testing.assert_array_equal(advantages, 0.0)
    assert stats["no_spread"] == 1.0


def test_the_floor_limits_the_effect_of_a_tiny_difference_in_reward():
    # Without a floor, the deviation of 0.0005 gives 7/sqrt(8) and more; upstream saw 7428.
    totals = np.array([[1.0] * 7 + [1.001]])
    advantages, stats = group_advantages(totals, 1e-2)
    np.testing.assert_allclose(advantages[0, 7], 0.001 * 7 / 8 / 1e-2, rtol=1e-4)
    assert stats["floored"] == 1.0


def test_a_group_of_one_has_no_advantage():
    advantages, stats = group_advantages(np.array([[1.0]]), 1e-2)
    assert advantages.tolist() == [[0.0]]
    assert stats["no_spread"] == 1.0


# Group 1 has mean 1, and the others of each reward have means 4/3, 2/3, 1, 1; group 2 has mean 0.5.
TWO = np.array([[0.0, 2.0, 1.0, 1.0], [1.0, 0.0, 0.0, 1.0]])


def test_dr_grpo_centres_without_dividing():
    advantages, stats = group_advantages(TWO, 1e-2, "dr_grpo")
    assert advantages.tolist() == [[-1.0, 1.0, 0.0, 0.0], [0.5, -0.5, -0.5, 0.5]]
    assert stats["floored"] == 0.0


def test_rloo_subtracts_the_mean_of_the_others():
    advantages, _ = group_advantages(TWO, 1e-2, "rloo")
    expected = [[-4 / 3, 4 / 3, 0.0, 0.0], [2 / 3, -2 / 3, -2 / 3, 2 / 3]]
    np.testing.assert_allclose(advantages, expected, rtol=1e-6)


@pytest.mark.parametrize("estimator", ["grpo", "dr_grpo", "rloo"])
def test_equal_rewards_and_groups_of_one_have_zero_advantages_with_every_estimator(estimator):
    for rewards in ([[0.3, 0.3, 0.3 + 1e-9]], [[2.0]]):
        advantages, stats = group_advantages(np.array(rewards), 1e-2, estimator)
        assert not advantages.any() and stats["no_spread"] == 1.0


def test_an_absent_reward_does_not_count_as_zero():
    nan = np.nan
    rewards = np.array([[0.0, 2.0, nan, nan], [nan, nan, nan, nan], [1.0, nan, nan, nan]])
    for estimator, out in (("grpo", 1 / np.sqrt(2)), ("dr_grpo", 1.0), ("rloo", 2.0)):
        advantages, stats = group_advantages(rewards, 1e-2, estimator)
        expected = [[-out, out, nan, nan], [nan] * 4, [0.0, nan, nan, nan]]
        np.testing.assert_allclose(advantages, expected, rtol=1e-6)
        assert stats["no_spread"] == 0.5  # of the two groups that have a reward
        assert stats["std"] == pytest.approx(np.sqrt(2) / 2)


def test_statistics_are_zero_without_any_reward():
    advantages, stats = group_advantages(np.full((2, 3), np.nan), 1e-2)
    assert np.isnan(advantages).all() and set(stats.values()) == {0.0}


def test_components_add_up_by_weight_and_the_weight_of_an_absent_one_goes_to_the_rest():
    answer, visual = np.array([[1.0, -1.0, 2.0]]), np.array([[3.0, np.nan, -2.0]])
    total = weighted_sum((answer, visual), (0.5, 0.25))
    # 0.5 + 0.75, then 0.75 x -1 for the answer alone, then 1 - 0.5
    assert total.tolist() == [[1.25, -0.75, 0.5]] and total.dtype == np.float32
