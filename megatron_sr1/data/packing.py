"""Samples to micro-batches: partitioned over ranks and rows by cost, then packed into rows.

Sequences are concatenated without separators, aligned with the *predicting* position, with mRoPE
positions that restart at each sequence (Qwen2-VL, arXiv 2409.12191, section 2.1; equal to
transformers' `get_rope_index`). Samples of a prompt have the same images, which a row encodes once,
and may share the prompt's tokens, so they stay together as far as the limit allows.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch

from megatron_sr1.errors import DataError
from megatron_sr1.records import PackedBatch, TrainSample, VisionInputs
from megatron_sr1.runtime.groups import share_out

PER_TOKEN = ("advantages", "old_logprobs", "engine_logprobs", "reference_logprobs")


class Size(NamedTuple):
    """Size of a sample: tokens with images expanded, its images' patches, number of its prompt.

    `shared` tokens of it are the prompt's, and computed once for all its samples in a row. `home`
    is the data-parallel rank that has its pixels.
    """

    tokens: int
    patches: int
    prompt: int
    shared: int = 0
    home: int | None = None


def size_of(sample: TrainSample, share_prompts: bool = False) -> Size:
    """Return the size of a training sample."""
    patches = sum(t * h * w for t, h, w in sample.image_grid_thw)
    shared = num_prompt_tokens(sample) if share_prompts else 0
    return Size(len(sample.token_ids), patches, sample.index, shared)


def num_prompt_tokens(sample: TrainSample) -> int:
    """Return the number of tokens before the first target; 0 if there is no target."""
    return int(sample.loss_mask.argmax())


def cost(sizes: Iterable[Size], patch_cost: float) -> float:
    """Return the cost of one row in tokens, `patch_cost` per patch; what is shared counts once."""
    sizes = list(sizes)
    shared = {s.prompt: s.shared + patch_cost * s.patches for s in sizes}
    return sum(s.tokens - s.shared for s in sizes) + sum(shared.values())


def plan_rows(sizes: Sequence[Size], budget: float, patch_cost: float) -> list[list[int]]:
    """Assign samples to about as few rows as the budget allows, equally full.

    A sample whose cost (tokens, `patch_cost` per patch) is above `budget` gets a row of its own;
    with a budget of 0, every sample does.

    Returns:
        rows of sample numbers, ascending within a row; rows ordered by their first sample.
    """
    if not budget:
        return [[number] for number in range(len(sizes))]
    parts, costs = _parts(sizes, budget, patch_cost)

    def fits(num_rows: int) -> bool:
        rows = share_out(costs, num_rows)
        return all(len(row) < 2 or sum(costs[p] for p in row) <= budget for row in rows)

    fewest = math.ceil(sum(min(c, budget) for c in costs) / budget)
    num_rows = fewest + bisect_left(range(fewest, len(parts)), True, key=fits)
    return sorted(sorted(n for p in row for n in parts[p]) for row in share_out(costs, num_rows))


def plan_ranks(sizes: Sequence[Size], num_ranks: int, patch_cost: float) -> list[list[int]]:
    """Return the sample numbers of each data-parallel rank, ascending and possibly none.

    `sizes` are those of an update's samples on all ranks. If they have homes, samples stay there as
    far as the balance allows.
    """
    parts, costs = _parts(sizes, cost(sizes, patch_cost) / num_ranks, patch_cost)
    homes = [home for part in parts if (home := sizes[part[0]].home) is not None]
    shares = share_out(costs, num_ranks, homes)
    return [sorted(n for p in share for n in parts[p]) for share in shares]


def _parts(
    sizes: Sequence[Size], limit: float, patch_cost: float
) -> tuple[list[list[int]], list[float]]:
    """Return the samples by prompt, one above the limit in the fewest parts, and their costs."""
    prompts: dict[Hashable, list[int]] = {}
    for number, size in enumerate(sizes):
        shares = size.patches or size.shared
        key = size.prompt if shares else (number,)
        prompts.setdefault(key, []).append(number)
    parts, costs = [], []
    for numbers in prompts.values():
        for num_parts in range(1, len(numbers) + 1):
            cut = [numbers[i::num_parts] for i in range(num_parts)]
            cut_costs = [cost((sizes[n] for n in part), patch_cost) for part in cut]
            if max(cut_costs) <= limit:
                break
        parts += cut
        costs += cut_costs
    return parts, costs


def pack_samples(
    samples: Sequence[TrainSample],
    pack_tokens: int,
    vision_of: Callable[[int], VisionInputs | None] | None,
    *,
    image_pad_id: int,
    merge_size: int,
    patch_cost: float = 0.0,
    pad_multiple: int = 1,
    sequence_multiple: int = 1,
    share_prompts: bool = False,
) -> list[PackedBatch]:
    """Pack samples into rows of at most `pack_tokens` without padding; 0: one row per sample.

    A larger sample gets a row of its own. `vision_of` returns the pixels of a sample by its index;
    on ranks without the vision tower it is None, and batches have no `vision`. A patch costs
    `patch_cost` tokens of the budget. Each sequence is padded at its end to a multiple of
    `sequence_multiple`; rows, by one last sequence, to `pad_multiple`, a multiple of the former.
    With `share_prompts`, samples of one index have one prompt, which a row computes once.

    Raises:
        DataError: image tokens, grids and pixels of a sample are inconsistent.
    """
    assert pad_multiple % sequence_multiple == 0, (pad_multiple, sequence_multiple)
    batches = []
    sizes = [size_of(sample, share_prompts) for sample in samples]
    for rows in plan_rows(sizes, pack_tokens, patch_cost):
        chosen = [samples[i] for i in rows]
        lengths = [-(-len(s.token_ids) // sequence_multiple) * sequence_multiple for s in chosen]
        padding = -sum(lengths) % pad_multiple
        lengths += [padding] if padding else []
        positions = [
            mrope_positions(s.token_ids, s.image_grid_thw, image_pad_id, merge_size, s.index)
            for s in chosen
        ]
        vision = _vision(chosen, vision_of) if vision_of else None
        batch = _row(rows, chosen, lengths, positions, vision)
        if share_prompts:
            shared = _shared_tokens(chosen) + [0] * bool(padding)
            batch = replace(batch, shared_tokens=torch.tensor(shared, dtype=torch.int32))
        batches.append(batch)
    return batches


def _shared_tokens(chosen: Sequence[TrainSample]) -> list[int]:
    """Return how many tokens each sample of a row shares with the sample before it."""
    shared = [0] * len(chosen)
    for number, (before, sample) in enumerate(pairwise(chosen), start=1):
        if before.index == sample.index:
            num_tokens = min(map(num_prompt_tokens, (before, sample)))
            is_same = (before.token_ids[:num_tokens] == sample.token_ids[:num_tokens]).all()
            assert is_same, f"sample {sample.index} has several prompts"
            shared[number] = num_tokens
    return shared


def mrope_positions(
    token_ids: np.ndarray,
    grids: Sequence[tuple[int, int, int]],
    image_pad_id: int,
    merge_size: int,
    index: int = -1,
) -> np.ndarray:
    """Return the mRoPE positions of one sequence, [3, tokens] int64: time, height, width.

    `token_ids`, [tokens] int64, have one `image_pad_id` per `merge_size` x `merge_size` patches;
    `grids` are (t, h, w) of each image in patches; errors name the sample by its `index`.

    Raises:
        DataError: the number of image tokens does not match the grids, or an image's tokens are
            not contiguous.
    """
    pads = np.flatnonzero(token_ids == image_pad_id)
    sizes = [t * (h // merge_size) * (w // merge_size) for t, h, w in grids]
    if len(pads) != sum(sizes):
        raise DataError(
            f"sample {index}: {len(pads)} image tokens, its {len(sizes)} images make {sum(sizes)}; "
            "the policy must not sample vision tokens"
        )
    positions = np.empty((3, len(token_ids)), np.int64)
    done, at, used = 0, 0, 0  # tokens laid out, position of the next, image tokens used
    for (t, h, w), size in zip(grids, sizes, strict=True):
        start = int(pads[used])
        if pads[used + size - 1] != start + size - 1:
            raise DataError(f"sample {index}: an image's {size} tokens are not in one run")
        positions[:, done:start] = np.arange(at, at + start - done)
        at += start - done
        cells = np.indices((t, h // merge_size, w // merge_size)).reshape(3, -1)
        positions[:, start : start + size] = cells + at
        at += max(h, w) // merge_size
        done, used = start + size, used + size
    positions[:, done:] = np.arange(at, at + len(token_ids) - done)
    return positions


def _row(
    sample_ids: list[int],
    chosen: list[TrainSample],
    lengths: list[int],
    positions: list[np.ndarray],
    vision: VisionInputs | None,
) -> PackedBatch:
    """Concatenate the samples of a row; the length of each includes its padding."""
    borders = [0, *np.cumsum(lengths).tolist()]

    def row(arrays: Sequence[np.ndarray], dtype: type, shift: int = 1) -> torch.Tensor:
        """Return [..., T]: entry t is the value of token t + shift of the same sequence.

        It is 0 in padding and, with a shift, at the last tokens of a sequence.
        """
        out: np.ndarray = np.zeros((*arrays[0].shape[:-1], borders[-1]), dtype)
        for start, sample, values in zip(borders, chosen, arrays, strict=False):
            num_tokens = len(sample.token_ids)
            assert values.shape[-1] == num_tokens, (values.shape, num_tokens)
            out[..., start : start + num_tokens - shift] = values[..., shift:]
        return torch.from_numpy(out)

    ids = [s.token_ids for s in chosen]
    per_token = {}
    for name in PER_TOKEN:
        given = [value for s in chosen if (value := getattr(s, name)) is not None]
        assert len(given) in (0, len(chosen)), f"{name}: given for some samples of a row only"
        per_token[name] = row(given, np.float32)[None] if given else None
    return PackedBatch(
        sample_ids=tuple(sample_ids),
        input_ids=row(ids, np.int64, shift=0)[None],
        labels=row(ids, np.int64)[None],
        loss_mask=row([s.loss_mask for s in chosen], np.float32)[None],
        position_ids=row(positions, np.int64, shift=0)[:, None],
        cu_seqlens=torch.tensor(borders, dtype=torch.int32),
        vision=vision,
        **per_token,
    )


def _vision(
    chosen: list[TrainSample], vision_of: Callable[[int], VisionInputs | None]
) -> VisionInputs | None:
    """Return the pixels of a row, one copy per example, after checking them against the grids."""
    found: dict[int, VisionInputs] = {}
    for sample in chosen:
        assert len(sample.image_grid_thw) == sample.num_images, sample.index
        if not sample.num_images:
            continue
        vision = found.get(sample.index) or vision_of(sample.index)
        grids = [tuple(g) for g in vision.image_grid_thw.tolist()] if vision else []
        if vision is None or grids != list(sample.image_grid_thw):
            raise DataError(
                f"sample {sample.index}: its tokens were laid out for image grids "
                f"{list(sample.image_grid_thw)}, its pixels have {grids}; tokens and pixels must "
                "come from the same images with the same pixel limits"
            )
        found[sample.index] = vision
    if not found:
        return None
    counts = [len(v.image_grid_thw) for v in found.values()]
    first = dict(zip(found, np.cumsum([0, *counts]).tolist(), strict=False))
    return VisionInputs(
        torch.cat([v.pixel_values for v in found.values()]),
        torch.cat([v.image_grid_thw for v in found.values()]),
        torch.tensor([first[s.index] + image for s in chosen for image in range(s.num_images)]),
    )
