"""Draws by seed and position: uniform, independent, and of the distribution that is asked for."""

import math
from types import SimpleNamespace

import numpy as np
import torch

from megatron_sr1.rollout.sampler import FullVocabularySampler, draw, uniforms

NUM = 200_000


def test_the_numbers_are_those_of_splitmix64():
    """By Python's integers, from the definition."""

    def mixed(value):
        value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        value = (value ^ value >> 27) * 0x94D049BB133111EB % 2**64
        return value ^ value >> 31

    golden, seeds, positions = 0x9E3779B97F4A7C15, [0, 7, 2**63 + 5], [0, 1, 2**31]
    found = uniforms(np.array(seeds, np.uint64), np.array(positions))
    for seed, position, value in zip(seeds, positions, found, strict=True):
        counted = (mixed((seed + golden) % 2**64) + position * golden) % 2**64
        assert value == (mixed(counted) >> 11) / 2**53


def test_numbers_of_neighbouring_seeds_and_positions_are_uniform_and_independent():
    for seeds, positions in (
        (np.arange(NUM), np.zeros(NUM)),
        (np.zeros(NUM), np.arange(NUM)),
        (np.arange(NUM) // 512, np.arange(NUM) % 512),
    ):
        found = uniforms(seeds, positions)
        assert 0 <= found.min() and found.max() < 1
        # Kolmogorov-Smirnov at 1 in 10,000, and the correlation with the one before at 4 sigma.
        largest = np.abs(np.sort(found) - np.arange(NUM) / NUM).max()
        assert largest < 2.23 / math.sqrt(NUM)
        assert abs(np.corrcoef(found[1:], found[:-1])[0, 1]) < 4 / math.sqrt(NUM)


def test_ids_are_drawn_in_proportion_to_their_probabilities():
    logits = torch.tensor([0.3, -1.0, float("-inf"), 2.0, 0.0, float("-inf")])
    drawn = draw(logits.repeat(NUM, 1), uniforms(np.arange(NUM), np.full(NUM, 9)))
    counts = torch.bincount(drawn, minlength=6) / NUM
    chances = logits.softmax(0)
    assert counts[2] == counts[5] == 0
    assert torch.allclose(counts, chances, atol=4 * math.sqrt(0.25 / NUM))


def test_the_ends_of_the_range_draw_possible_ids_and_unlikely_ones_keep_their_share():
    impossible = float("-inf")
    logits = torch.tensor([[impossible, 1.0, 0.0, impossible]]).repeat(3, 1)
    drawn = draw(logits, np.array([0.0, 1 - 2**-53, 1 - 2**-25]))
    assert drawn.tolist() == [1, 2, 2]
    many = torch.zeros(1, 152_064)  # the published vocabulary
    many[0, -1] = 5.0
    share = 1 - math.exp(5) / (152_063 + math.exp(5))
    below, above = draw(many.repeat(2, 1), np.array([share - 1e-5, share + 1e-5])).tolist()
    assert below < 152_063 == above


def test_a_sequence_is_the_same_in_any_batch():
    """Rows are moved and joined by others; only the seed and the position count."""
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    seeds, positions = [3, 1, 4, 1, 5, 9], np.array([4, 4, 7, 5, 0, 2])

    def sampled(rows):
        rows = list(rows)
        sampler = FullVocabularySampler(
            lambda: np.array([*positions[rows], 99]), SimpleNamespace(SamplerOutput=tuple_of), [0]
        )
        generators = {n: torch.Generator().manual_seed(seeds[row]) for n, row in enumerate(rows)}
        metadata = SimpleNamespace(
            temperature=torch.ones(len(rows)),
            max_num_logprobs=None,
            all_greedy=False,
            all_random=True,
            generators=generators,
        )
        return sampler(logits[rows], metadata)[0].squeeze(1).tolist()

    together = sampled(range(6))
    assert sampled([5, 2, 0]) == [together[n] for n in (5, 2, 0)]
    assert [sampled([n])[0] for n in range(6)] == together and len(set(together)) > 3


def tuple_of(*values):
    return values
