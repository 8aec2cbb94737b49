"""Load balancing: partitions samples over rows and data-parallel ranks by their cost.

In: the sizes of samples, the same on all ranks. Out: rows within a budget, or a share for each
rank; parts are assigned largest first (runtime/groups.py). Samples of a prompt have the same
images, which a row encodes once, so they stay together as far as the limit allows.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

from megatron_sr1.records import TrainSample
from megatron_sr1.runtime.groups import share_out


@dataclass(frozen=True)
class Size:
    """Size of a sample.

    Attributes:
        tokens: length of the sequence, images expanded.
        patches: patches of its images that the vision tower computes.
        prompt: number of the prompt; samples of one prompt have the same images.
    """

    tokens: int
    patches: int
    prompt: int


def size_of(sample: TrainSample) -> Size:
    """Return the size of a training sample."""
    patches = sum(t * h * w for t, h, w in sample.image_grid_thw)
    return Size(len(sample.token_ids), patches, sample.index)


def cost(sizes: Iterable[Size], patch_cost: float) -> float:
    """Return the cost of one row in tokens; images that samples share count once.

    Args:
        sizes: sizes of the row's samples.
        patch_cost: cost of a patch, tokens.
    """
    sizes = list(sizes)
    images = {s.prompt: s.patches for s in sizes}
    return sum(s.tokens for s in sizes) + patch_cost * sum(images.values())


def plan_rows(sizes: Sequence[Size], budget: float, patch_cost: float) -> list[list[int]]:
    """Assign samples to about as few rows as the budget allows, equally full.

    Args:
        sizes: sizes of the samples.
        budget: largest cost of a row, tokens; a sample beyond it gets a row of its own. With 0,
            every sample does.
        patch_cost: cost of a patch, tokens.

    Returns:
        rows of sample numbers, ascending within a row; rows ordered by their first sample.
    """
    if not budget:
        return [[number] for number in range(len(sizes))]
    parts = _parts(sizes, budget, patch_cost)
    costs = [cost((sizes[n] for n in part), patch_cost) for part in parts]

    def fits(num_rows: int) -> bool:
        rows = share_out(costs, num_rows)
        return all(len(row) < 2 or sum(costs[p] for p in row) <= budget for row in rows)

    fewest = math.ceil(sum(min(c, budget) for c in costs) / budget)
    num_rows = fewest + bisect_left(range(fewest, len(parts)), True, key=fits)
    return sorted(_samples(parts, row) for row in share_out(costs, num_rows))


def plan_ranks(sizes: Sequence[Size], num_ranks: int, patch_cost: float) -> list[list[int]]:
    """Assign the samples of an update to data-parallel ranks.

    Args:
        sizes: sizes of the samples of all ranks.
        num_ranks: number of data-parallel ranks.
        patch_cost: cost of a patch, tokens.

    Returns:
        sample numbers of each rank, ascending; possibly none.
    """
    parts = _parts(sizes, cost(sizes, patch_cost) / num_ranks, patch_cost)
    costs = [cost((sizes[n] for n in part), patch_cost) for part in parts]
    return [_samples(parts, share) for share in share_out(costs, num_ranks)]


def _parts(sizes: Sequence[Size], limit: float, patch_cost: float) -> list[list[int]]:
    """Group samples by prompt; split a prompt above the limit into the fewest parts within it."""
    prompts: dict[Hashable, list[int]] = {}
    for number, size in enumerate(sizes):
        alone = (number,)  # text-only samples share no images
        prompts.setdefault(size.prompt if size.patches else alone, []).append(number)
    parts = []
    for numbers in prompts.values():
        for num_parts in range(1, len(numbers) + 1):
            cut = [numbers[i::num_parts] for i in range(num_parts)]
            if all(cost((sizes[n] for n in part), patch_cost) <= limit for part in cut):
                break
        parts += cut
    return parts


def _samples(parts: Sequence[list[int]], share: Iterable[int]) -> list[int]:
    return sorted(number for part in share for number in parts[part])
