"""Assignment of images to ranks; the features are compared in tests/distributed."""

import random

import pytest
import torch

from megatron_sr1.errors import DataError
from megatron_sr1.model.vision import encode_by_turns
from megatron_sr1.records import VisionInputs
from megatron_sr1.runtime.groups import share_out


def test_images_go_largest_first_to_the_rank_with_the_least_work():
    assert [sorted(share) for share in share_out([4, 16, 4, 8, 4], 2)] == [[1, 4], [0, 2, 3]]
    assert share_out([8], 3) == [[0], [], []]
    assert share_out([], 2) == [[], []]


def test_each_image_has_one_rank_and_no_rank_exceeds_the_optimum_by_a_third():
    rng = random.Random(0)
    for num_ranks in (2, 3, 8):
        sizes = [4 * rng.randint(1, 200) for _ in range(rng.randint(1, 60))]
        shares = share_out(sizes, num_ranks)
        assert sorted(sum(shares, [])) == list(range(len(sizes)))
        best = max(sum(sizes) / num_ranks, max(sizes))  # no assignment is below this
        assert max(sum(sizes[i] for i in share) for share in shares) <= best * 4 / 3


def test_pixels_that_are_not_their_grids_are_refused_on_all_ranks(groups):
    vision = VisionInputs(torch.zeros(12, 3), torch.tensor([[1, 2, 4], [1, 2, 4]]))
    with pytest.raises(DataError, match="name 16 patches, pixel_values hold 12"):
        encode_by_turns(None, vision, groups.context)
