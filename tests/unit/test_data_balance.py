"""Partition over rows and ranks: each sample once, within the budget, evenly."""

import random

import pytest

from megatron_sr1.data.packing import Size, cost, plan_ranks, plan_rows

WEIGHT = 0.25


def text(*lengths):
    return [Size(tokens, 0, -1) for tokens in lengths]


def random_sizes(rng):
    """Rollouts of some prompts, text-only ones among them, of quite mixed lengths."""
    sizes = []
    for prompt in range(rng.randint(1, 40)):
        patches = rng.choice([0, 0, 4 * rng.randint(1, 200)])
        for _ in range(rng.choice([1, 8])):
            length = patches // 4 + int(rng.lognormvariate(4, 0.8)) + 2
            sizes.append(Size(length, patches, prompt))
    rng.shuffle(sizes)
    return sizes


def costs(sizes, plan):
    return [cost((sizes[n] for n in numbers), WEIGHT) for numbers in plan]


def test_images_of_a_prompt_count_once_in_a_row():
    assert cost([Size(10, 40, 3), Size(12, 40, 3), Size(5, 8, 4)], 0.25) == 10 + 12 + 5 + 10 + 2


def test_a_shared_prompt_costs_once():
    sizes = [Size(10, 40, 3, 6), Size(12, 40, 3, 6), Size(5, 8, 4, 2)]
    assert cost(sizes, 0.25) == 6 + 4 + 6 + 10 + 5 + 2
    text_alone = [Size(10, 0, 1, 8), Size(10, 0, 2, 8)] * 2
    assert plan_rows(text_alone, 12, 0) == [[0, 2], [1, 3]]


def test_rows_by_hand():
    assert plan_rows(text(5, 30, 7, 3, 12, 9, 1), 16, 0) == [[0, 2], [1], [3, 5], [4, 6]]
    assert plan_rows(text(17, 18, 16), 16, 0) == [[0], [1], [2]]
    rollouts = [Size(10, 40, 1), Size(10, 40, 2), Size(10, 40, 1), Size(10, 40, 2)]
    assert plan_rows(rollouts, 30, 0.25) == [[0, 2], [1, 3]]  # 30 each, images once
    assert plan_rows(rollouts, 29, 0.25) == [[0], [1], [2], [3]]
    assert plan_rows(rollouts, 60, 0.25) == [[0, 1, 2, 3]]
    assert plan_rows(rollouts, 0, 0.25) == [[0], [1], [2], [3]]
    assert plan_rows([], 16, 0.25) == []


def test_ranks_by_hand():
    assert plan_ranks(text(8, 1, 4, 3), 2, 0) == [[0], [1, 2, 3]]
    assert plan_ranks(text(8), 3, 0) == [[0], [], []]
    # A prompt that is more than a fair share is cut: its image is then encoded on both ranks.
    assert plan_ranks([Size(10, 8, 5)] * 4, 2, 0.5) == [[0, 2], [1, 3]]


@pytest.mark.parametrize("seed", range(30))
def test_rows_hold_every_sample_once_within_the_budget_and_are_few(seed):
    rng = random.Random(seed)
    sizes = random_sizes(rng)
    budget = rng.choice([64, 512, 2048])
    rows = plan_rows(sizes, budget, WEIGHT)
    assert rows == plan_rows(sizes, budget, WEIGHT)
    assert sorted(sum(rows, [])) == list(range(len(sizes)))
    pairs = zip(costs(sizes, rows), rows, strict=True)
    assert all(taken <= budget or len(row) == 1 for taken, row in pairs)
    # With one row less, each would be more than half full and yet one part too many.
    alone = sum(min(cost([size], WEIGHT), budget) for size in sizes)
    assert len(rows) <= 2 * alone / budget + 1


@pytest.mark.parametrize("seed", range(30))
def test_no_rank_is_above_the_mean_by_more_than_its_largest_part(seed):
    rng = random.Random(seed)
    sizes = random_sizes(rng)
    num_ranks = rng.choice([1, 2, 3, 8])
    shares = plan_ranks(sizes, num_ranks, WEIGHT)
    assert len(shares) == num_ranks and sorted(sum(shares, [])) == list(range(len(sizes)))
    mean = cost(sizes, WEIGHT) / num_ranks
    largest = max(cost([size], WEIGHT) for size in sizes)
    # A part is a prompt within the mean, or else a sample.
    assert max(costs(sizes, shares)) <= 2 * max(mean, largest)


def test_prompts_stay_at_home_up_to_the_mean_and_the_shortest_leave():
    sizes = [Size(tokens, 0, -1, home=home) for tokens, home in ((8, 1), (1, 1), (4, 1), (3, 0))]
    assert plan_ranks(sizes, 2, 0) == [[1, 2, 3], [0]]
    equal = [Size(5, 8, prompt, home=prompt % 2) for prompt in range(6)]
    assert plan_ranks(equal, 2, 0.5) == [[0, 2, 4], [1, 3, 5]]


@pytest.mark.parametrize("seed", range(10))
def test_nearly_all_prompts_stay_where_their_images_were_read(seed):
    rng = random.Random(seed)
    num_ranks = rng.choice([2, 8])
    sizes = []
    for prompt in range(32 * num_ranks):
        image = 4 * rng.randint(40, 80)
        for _ in range(8):
            length = 60 + image // 4 + rng.randint(0, 40)
            sizes.append(Size(length, image, prompt, home=prompt % num_ranks))
    shares = plan_ranks(sizes, num_ranks, WEIGHT)
    taken = costs(sizes, shares)
    assert max(taken) < 1.03 * sum(taken) / num_ranks
    stay = sum(sizes[n].home == rank for rank, share in enumerate(shares) for n in share)
    assert stay >= 0.9 * len(sizes)


def test_many_prompts_are_spread_evenly_and_stay_whole():
    rng = random.Random(5)
    sizes = [
        Size(60 + rng.randint(0, 80), 4 * 50, prompt) for prompt in range(64) for _ in range(8)
    ]
    shares = plan_ranks(sizes, 8, WEIGHT)
    taken = costs(sizes, shares)
    assert max(taken) < 1.03 * sum(taken) / 8
    prompts = [{sizes[n].prompt for n in share} for share in shares]
    assert sum(map(len, prompts)) == 64
    rows = plan_rows(sizes, 8192, WEIGHT)
    assert max(costs(sizes, rows)) < 1.1 * min(costs(sizes, rows))
    assert sum(len({sizes[n].prompt for n in row}) for row in rows) == 64
