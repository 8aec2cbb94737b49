"""Samples to micro-batches: partitioned over ranks and rows by cost, then packed into rows.

Sequences are concatenated without separators, aligned with the *predicting* position, with mRoPE
positions that restart at each sequence (Qwen2-VL, arXiv 2409.12191, section 2.1; equal to
transformers' `get_rope_index`). Samples of a prompt have the same images, which a row encodes once,
and may share the prompt's tokens, so they stay together as far as the limit allows.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import replace
from itertools import islice, pairwise
from threading import Lock
from typing import Any, NamedTuple

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
    shared = sample.num_prompt_tokens if share_prompts else 0
    return Size(len(sample.token_ids), patches, sample.index, shared)


def cost(sizes: Iterable[Size], patch_cost: float) -> float:
    """Return the cost of one row in tokens, `patch_cost` per patch; what is shared counts once."""
    own, of_prompts = 0, dict[int, float]()
    for tokens, patches, prompt, shared, _ in sizes:
        own += tokens - shared
        of_prompts[prompt] = shared + patch_cost * patches
    return own + sum(of_prompts.values())


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
    later: Executor | None = None,
) -> Sequence[PackedBatch]:
    """Pack samples into rows of at most `pack_tokens` without padding; 0: one row per sample.

    A larger sample gets a row of its own. `vision_of` returns the pixels of a sample by its index;
    on ranks without the vision tower it is None, and batches have no `vision`. A patch costs
    `patch_cost` tokens of the budget. Each sequence is padded at its end to a multiple of
    `sequence_multiple`; rows, by one last sequence, to `pad_multiple`, a multiple of the former.
    With `share_prompts`, samples of one index have one prompt, which a row computes once. With an
    executor, only the first row is packed now, and it packs the others later.

    Raises:
        DataError: image tokens, grids and pixels of a sample are inconsistent.
    """
    assert pad_multiple % sequence_multiple == 0, (pad_multiple, sequence_multiple)

    def packed(numbers: list[int]) -> PackedBatch:
        chosen = [samples[i] for i in numbers]
        lengths = [-(-len(s.token_ids) // sequence_multiple) * sequence_multiple for s in chosen]
        padding = -sum(lengths) % pad_multiple
        lengths += [padding] if padding else []
        positions = mrope_positions(chosen, image_pad_id, merge_size)
        vision = _vision(chosen, vision_of) if vision_of else None
        batch = _row(numbers, chosen, lengths, positions, vision)
        if share_prompts:
            shared = _shared_tokens(chosen) + [0] * bool(padding)
            batch = replace(batch, shared_tokens=torch.tensor(shared, dtype=torch.int32))
        return batch

    sizes = [size_of(sample, share_prompts) for sample in samples]
    plan = plan_rows(sizes, pack_tokens, patch_cost)
    if later is None or len(plan) < 2:
        return list(map(packed, plan))
    return _LaterRows(packed(plan[0]), packed, plan[1:], later)


class _LaterRows(Sequence[PackedBatch]):
    """Rows of which the first is packed; once it is asked for, an executor packs the others.

    Asking for one of them waits for it.
    """

    def __init__(
        self,
        first: PackedBatch,
        pack: Callable[[list[int]], PackedBatch],
        others: Sequence[list[int]],
        executor: Executor,
    ) -> None:
        self._first, self._lock = first, Lock()
        self._pack, self._plan, self._executor = pack, others, executor
        self._others: list[Future[PackedBatch]] = []

    def __len__(self) -> int:
        return 1 + len(self._plan)

    def __iter__(self) -> Iterator[PackedBatch]:
        # Sequence's own would take an IndexError of the thread for the end of the rows.
        return (self[number] for number in range(len(self)))

    def __getitem__(self, number: Any) -> Any:
        number = range(len(self))[number]
        with self._lock:
            if not self._others:
                self._others = [self._executor.submit(self._pack, each) for each in self._plan]
        return self._others[number - 1].result() if number else self._first


def _shared_tokens(chosen: Sequence[TrainSample]) -> list[int]:
    """Return how many tokens each sample of a row shares with the sample before it."""
    shared = [0] * len(chosen)
    for number, (before, sample) in enumerate(pairwise(chosen), start=1):
        if before.index == sample.index:
            num_tokens = min(before.num_prompt_tokens, sample.num_prompt_tokens)
            first, second = (s.token_ids[:num_tokens].tobytes() for s in (before, sample))
            assert first == second, f"sample {sample.index} has several prompts"
            shared[number] = num_tokens
    return shared


def mrope_positions(
    samples: Sequence[TrainSample], image_pad_id: int, merge_size: int
) -> np.ndarray:
    """Return the mRoPE positions of samples, one after the other, as time, height and width.

    Their tokens have one `image_pad_id` per `merge_size` x `merge_size` patches of an image.

    Returns:
        [3, tokens of all samples] int64; each sample starts at 0.

    Raises:
        DataError: the number of image tokens does not match the grids, or an image's tokens are
            not contiguous.
    """
    lengths = [len(s.token_ids) for s in samples]
    ends = np.cumsum(lengths)
    pads = np.flatnonzero(np.concatenate([s.token_ids for s in samples]) == image_pad_id)
    grids = [(t, h // merge_size, w // merge_size) for s in samples for t, h, w in s.image_grid_thw]
    sizes = [math.prod(grid) for grid in grids]
    _check_image_tokens(samples, sizes, pads, ends)
    steps = np.ones(ends[-1], np.int64)  # positions that a token takes; an image's last has all
    steps[pads] = 0
    if grids:
        steps[pads[np.cumsum(sizes) - 1]] = [max(height, width) for _, height, width in grids]
    before = np.append(0, np.cumsum(steps))
    positions = np.tile(before[:-1] - np.repeat(before[ends - lengths], lengths), (3, 1))
    if grids:
        cells = {grid: np.indices(grid).reshape(3, -1) for grid in set(grids)}
        positions[:, pads] += np.concatenate([cells[grid] for grid in grids], axis=1)
    return positions


def _check_image_tokens(
    samples: Sequence[TrainSample], sizes: Iterable[int], pads: np.ndarray, ends: np.ndarray
) -> None:
    """Raise a DataError unless each image of each sample has its tokens, one after the other.

    `sizes` are the tokens of all images, `pads` the places of image tokens, and `ends` of samples.
    """
    left, used = iter(sizes), 0
    counts = np.diff(np.searchsorted(pads, ends), prepend=0).tolist()
    for sample, count in zip(samples, counts, strict=True):
        own = list(islice(left, len(sample.image_grid_thw)))
        if count != sum(own):
            raise DataError(
                f"sample {sample.index}: {count} image tokens, its {len(own)} images make "
                f"{sum(own)}; the policy must not sample vision tokens"
            )
        for size in own:
            if pads[used + size - 1] != pads[used] + size - 1:
                what = f"an image's {size} tokens are not in one run"
                raise DataError(f"sample {sample.index}: {what}")
            used += size


class _Places(NamedTuple):
    """Where the tokens of a row's samples are.

    Attributes:
        counts: tokens of each sample, without padding.
        in_row: [tokens of all samples], place of each token in the row.
        predicted: numbers of the tokens that another one predicts: all but each sample's first.
        width: tokens of the row.
    """

    counts: list[int]
    in_row: np.ndarray
    predicted: np.ndarray
    width: int

    @classmethod
    def of(cls, samples: Sequence[TrainSample], borders: np.ndarray) -> _Places:
        """Return those of samples that start at these borders, of which there may be more."""
        counts = [len(s.token_ids) for s in samples]
        num_tokens = np.array(counts)
        starts = np.cumsum(num_tokens) - num_tokens  # without padding
        numbers = np.arange(num_tokens.sum())
        in_row = numbers + np.repeat(borders[: len(counts)] - starts, num_tokens)
        return cls(counts, in_row, np.delete(numbers, starts), int(borders[-1]))

    def row(self, values: np.ndarray, dtype: type) -> torch.Tensor:
        """Return [..., T], 0 in padding; `values` are [..., tokens of all samples]."""
        out: np.ndarray = np.zeros((*values.shape[:-1], self.width), dtype)
        out[..., self.in_row] = values
        return torch.from_numpy(out)

    def next_tokens(self, values: Sequence[np.ndarray], dtype: type) -> torch.Tensor:
        """Return [1, T]: entry t is the value of token t + 1, 0 at the end of a sequence."""
        assert [len(v) for v in values] == self.counts
        out: np.ndarray = np.zeros((1, self.width), dtype)
        out[0, self.in_row[self.predicted] - 1] = np.concatenate(values)[self.predicted]
        return torch.from_numpy(out)


def _row(
    sample_ids: list[int],
    chosen: list[TrainSample],
    lengths: list[int],
    positions: np.ndarray,
    vision: VisionInputs | None,
) -> PackedBatch:
    """Concatenate the samples of a row; the length of each includes its padding.

    `positions` are those of `mrope_positions`.
    """
    borders = np.array([0, *np.cumsum(lengths)])
    places = _Places.of(chosen, borders)
    per_token = {}
    for name in PER_TOKEN:
        given = [value for s in chosen if (value := getattr(s, name)) is not None]
        assert len(given) in (0, len(chosen)), f"{name}: given for some samples of a row only"
        per_token[name] = places.next_tokens(given, np.float32) if given else None
    token_ids = [s.token_ids for s in chosen]
    return PackedBatch(
        sample_ids=tuple(sample_ids),
        input_ids=places.row(np.concatenate(token_ids)[None], np.int64),
        labels=places.next_tokens(token_ids, np.int64),
        loss_mask=places.next_tokens([s.loss_mask for s in chosen], np.float32),
        position_ids=places.row(positions, np.int64)[:, None],
        cu_seqlens=torch.tensor(borders, dtype=torch.int32),
        vision=vision,
        **per_token,
    )


def advantage_fields(
    batch: PackedBatch, samples: Sequence[TrainSample], advantages: Sequence[np.ndarray | None]
) -> dict[str, torch.Tensor]:
    """Return a row's fields with advantages; without one, a sample has no targets.

    `samples` are those that were packed, and `advantages` [tokens] float32 of each.
    """
    chosen = [(samples[number], advantages[number]) for number in batch.sample_ids]
    places = _Places.of([sample for sample, _ in chosen], batch.cu_seqlens.numpy())
    given = [np.zeros(len(s.token_ids)) if found is None else found for s, found in chosen]
    masks = [s.loss_mask & (found is not None) for s, found in chosen]
    return {
        "loss_mask": places.next_tokens(masks, np.float32),
        "advantages": places.next_tokens(given, np.float32),
    }


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
        if vision is None or vision.grids != sample.image_grid_thw:
            raise DataError(
                f"sample {sample.index}: its tokens were laid out for image grids "
                f"{list(sample.image_grid_thw)}, its pixels have "
                f"{list(vision.grids) if vision else []}; tokens and pixels must come from the "
                "same images with the same pixel limits"
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
