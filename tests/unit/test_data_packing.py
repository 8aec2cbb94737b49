"""Packing by hand-computed rows: borders, shift, padding, budget.

Which samples share a row: test_data_balance.py. Positions are compared with transformers in
tests/parity/test_data_transformers.py.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from megatron_sr1.data.packing import advantage_fields, mrope_positions, pack_samples
from megatron_sr1.errors import DataError
from megatron_sr1.model.vision import feature_numbers
from megatron_sr1.records import TrainSample, VisionInputs

PAD = 9


def sample(index, ids, mask, grids=(), **extra):
    extra = {k: np.asarray(v, np.float32) for k, v in extra.items()}
    ids, mask = np.asarray(ids, np.int64), np.asarray(mask, bool)
    return TrainSample(index, len(grids), ids, mask, tuple(grids), **extra)


def pack(samples, pack_tokens=100, vision_of=None, **options):
    return pack_samples(samples, pack_tokens, vision_of, image_pad_id=PAD, merge_size=2, **options)


def pixels(index, grids):
    count = sum(t * h * w for t, h, w in grids)
    return VisionInputs(torch.full((count, 3), float(index)), torch.tensor(grids))


def test_entries_are_about_the_token_that_the_position_predicts():
    one = sample(0, [1, 2, 3], [0, 0, 1], advantages=[0, 0, 5.0], old_logprobs=[0, 0, -1.5])
    two = sample(
        1, [4, 5, 6, 7], [0, 1, 1, 0], advantages=[0, 6, 7, 0], old_logprobs=[0, -2, -3, 0]
    )
    (batch,) = pack([one, two], pad_multiple=4)
    assert batch.sample_ids == (0, 1)
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5, 6, 7, 0]]
    assert batch.labels.tolist() == [[2, 3, 0, 5, 6, 7, 0, 0]]
    assert batch.loss_mask.tolist() == [[0, 1, 0, 1, 1, 0, 0, 0]]
    assert batch.advantages.tolist() == [[0, 5, 0, 6, 7, 0, 0, 0]]
    assert batch.old_logprobs.tolist() == [[0, -1.5, 0, -2, -3, 0, 0, 0]]
    assert batch.engine_logprobs is None and batch.reference_logprobs is None
    assert batch.cu_seqlens.tolist() == [0, 3, 7, 8]
    assert batch.position_ids.tolist() == [[[0, 1, 2, 0, 1, 2, 3, 0]]] * 3
    assert batch.cu_seqlens.dtype == torch.int32 and batch.loss_mask.dtype == torch.float32
    assert batch.input_ids.dtype == batch.labels.dtype == batch.position_ids.dtype == torch.int64


def test_advantages_come_later_and_a_sample_without_them_has_no_targets():
    given = [[0, 0, 5.0], [0, 6, 7, 0], [0, 0, 0, 0, 8]]
    one, two = ([1, 2, 3], [0, 0, 1]), ([4, 5, 6, 7], [0, 1, 1, 0])
    three = [8, 5, 6, 7, 8], [0, 0, 0, 0, 1]
    early = [sample(n, *s, advantages=given[n]) for n, s in enumerate((one, two, three))]
    late = [sample(n, *s) for n, s in enumerate((one, two, three))]
    options = {"pack_tokens": 9, "sequence_multiple": 2, "pad_multiple": 8}
    arrays = [np.array(values, np.float32) for values in given]
    for batch, expected in zip(pack(late, **options), pack(early, **options), strict=True):
        assert batch.advantages is None
        got = advantage_fields(batch, late, arrays)
        assert set(got) == {"advantages", "loss_mask"}
        for name, values in got.items():
            assert torch.equal(values, getattr(expected, name)), name
            assert values.dtype == getattr(expected, name).dtype
    (batch,) = pack(late[:2], pad_multiple=4)
    got = advantage_fields(batch, late[:2], [arrays[0], None])
    assert got["advantages"].tolist() == [[0, 5, 0, 0, 0, 0, 0, 0]]
    assert got["loss_mask"].tolist() == [[0, 1, 0, 0, 0, 0, 0, 0]]


def test_all_rows_but_the_first_are_packed_once_it_is_asked_for():
    samples = [sample(n, [1, 2, 3 + n], [0, 0, 1]) for n in range(4)]
    whole = pack(samples, pack_tokens=6)
    assert len(whole) == 2
    with ThreadPoolExecutor(1) as packer:
        later = pack(samples, pack_tokens=6, later=packer)
        assert len(later) == 2 and not packer._threads
        for row, expected in zip(later, whole, strict=True):
            assert row.sample_ids == expected.sample_ids
            assert torch.equal(row.input_ids, expected.input_ids)
        assert later[1] is later[-1] and later[0] is later[-2]
        assert len(packer._threads) == 1
    number = whole[1].sample_ids[0]
    samples[number] = sample(number, [PAD, 1, 2], [0, 0, 1])
    with ThreadPoolExecutor(1) as packer:
        later = pack(samples, pack_tokens=6, later=packer)
        assert later[0].sample_ids == whole[0].sample_ids
        with pytest.raises(DataError, match=f"sample {number}: 1 image tokens"):
            list(later)
        with pytest.raises(IndexError):
            later[2]
    samples = [sample(0, [1, 2], [0, 1]), sample(1, [PAD, 1, 2], [0, 0, 1], grids=[(1, 2, 2)])]
    with ThreadPoolExecutor(1) as packer:
        later = pack(samples, 3, [].__getitem__, later=packer)
        with pytest.raises(IndexError, match="list index"):  # not taken for the end of the rows
            list(later)


def test_each_sequence_is_padded_where_the_layout_asks_for_it():
    one = sample(0, [1, 2, 3], [0, 0, 1], advantages=[0, 0, 5.0])
    two = sample(1, [4, 5, 6, 7], [0, 1, 1, 0], advantages=[0, 6, 7, 0])
    three = sample(2, [8, 5, 6, 7, 8], [0, 0, 0, 0, 1], advantages=[0, 0, 0, 0, 8])
    (batch,) = pack([one, two, three], sequence_multiple=4, pad_multiple=12)
    assert batch.input_ids.tolist() == [
        [1, 2, 3, 0, 4, 5, 6, 7, 8, 5, 6, 7, 8, 0, 0, 0, *[0] * 8],
    ]
    assert batch.labels.tolist() == [[2, 3, 0, 0, 5, 6, 7, 0, 5, 6, 7, 8, *[0] * 12]]
    assert batch.loss_mask.tolist() == [[0, 1, 0, 0, 1, 1, 0, 0, 0, 0, 0, 1, *[0] * 12]]
    assert batch.advantages.tolist() == [[0, 5, 0, 0, 6, 7, 0, 0, 0, 0, 0, 8, *[0] * 12]]
    assert batch.cu_seqlens.tolist() == [0, 4, 8, 16, 24]
    positions = [0, 1, 2, 0, 0, 1, 2, 3, 0, 1, 2, 3, 4, *[0] * 11]
    assert batch.position_ids.tolist() == [[positions]] * 3


def test_packing_never_crosses_sample_boundaries():
    rng = np.random.default_rng(0)
    samples = []
    for index in range(40):
        length = int(rng.integers(2, 30))
        mask = rng.random(length) < 0.5
        mask[0] = False
        samples.append(sample(index, rng.integers(10, 99, length), mask, advantages=mask * 1.0))
    batches = pack(samples, 64, pad_multiple=8)
    assert sorted(i for b in batches for i in b.sample_ids) == list(range(40))
    for batch in batches:
        for number, start, end in zip(
            batch.sample_ids, batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=False
        ):
            ids = torch.from_numpy(samples[number].token_ids)
            assert torch.equal(batch.input_ids[0, start:end], ids)
            assert torch.equal(batch.labels[0, start : end - 1], ids[1:])
            mask = torch.from_numpy(samples[number].loss_mask).float()
            assert torch.equal(batch.loss_mask[0, start : end - 1], mask[1:])
            assert batch.labels[0, end - 1] == 0 and batch.loss_mask[0, end - 1] == 0
        assert torch.equal(batch.advantages, batch.loss_mask)
        assert batch.input_ids.shape[1] % 8 == 0


def test_a_row_counts_the_patches_of_its_images_once():
    grids = [(1, 4, 4)]
    samples = [sample(3, [PAD] * 4 + [1] * 6, [0] * 10, grids) for _ in range(3)]
    options = {"vision_of": lambda index: pixels(index, grids), "patch_cost": 0.25}
    assert [b.sample_ids for b in pack(samples, 34, **options)] == [(0, 1, 2)]
    assert [b.sample_ids for b in pack(samples, 33, **options)] == [(0, 2), (1,)]
    assert [b.sample_ids for b in pack(samples, 0, **options)] == [(0,), (1,), (2,)]


def test_an_image_spans_height_and_width_and_text_continues_after_its_longer_side():
    ids = [1, PAD, PAD, PAD, PAD, PAD, PAD, 2, 3]  # a 4 x 6 grid merges to 2 x 3
    asked = sample(0, ids, [0] * 9, [(1, 4, 6)])
    got = mrope_positions([asked], image_pad_id=PAD, merge_size=2)
    assert got.tolist() == [
        [0, 1, 1, 1, 1, 1, 1, 4, 5],
        [0, 1, 1, 1, 2, 2, 2, 4, 5],
        [0, 1, 2, 3, 1, 2, 3, 4, 5],
    ]


def test_images_follow_the_samples_of_their_row():
    grids = {0: [(1, 2, 2), (1, 2, 4)], 2: [(1, 4, 2)]}
    samples = [
        sample(0, [1, PAD, 2, PAD, PAD], [0] * 5, grids[0]),
        sample(-1, [1, 2], [0, 1]),
        sample(2, [PAD, PAD, 1], [0] * 3, grids[2]),
    ]
    (batch,) = pack(samples, vision_of=lambda i: pixels(i, grids[i]))
    assert batch.vision.image_grid_thw.tolist() == [[1, 2, 2], [1, 2, 4], [1, 4, 2]]
    assert batch.vision.pixel_values[:, 0].tolist() == [0.0] * 12 + [2.0] * 8
    assert pack(samples[1:2], vision_of=lambda i: None)[0].vision is None
    assert pack(samples, vision_of=None)[0].vision is None


def test_images_of_one_example_are_in_a_row_once_and_occur_with_each_of_its_samples():
    grids = {4: [(1, 2, 2), (1, 2, 4)], 2: [(1, 4, 2)]}
    asked = []

    def vision_of(index):
        asked.append(index)
        return pixels(index, grids[index])

    two = [
        sample(4, [1, PAD, 2, PAD, PAD, *rest], [0] * (5 + len(rest)), grids[4])
        for rest in ([3], [4, 5])
    ]
    other = sample(2, [PAD, PAD, 1], [0] * 3, grids[2])
    (batch,) = pack([two[0], other, two[1]], vision_of=vision_of)
    assert asked == [4, 2]
    assert batch.vision.image_grid_thw.tolist() == [[1, 2, 2], [1, 2, 4], [1, 4, 2]]
    assert batch.vision.pixel_values[:, 0].tolist() == [4.0] * 12 + [2.0] * 8
    assert batch.vision.occurrences.tolist() == [0, 1, 2, 0, 1]
    assert feature_numbers(batch.vision, 2).tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    wrong = sample(4, [PAD, PAD, 1], [0] * 3, grids[2])
    with pytest.raises(DataError, match=r"sample 4: .* for image grids \[\(1, 4, 2\)\]"):
        pack([two[0], wrong], vision_of=vision_of)


def test_tokens_grids_and_pixels_that_disagree_are_refused():
    grids = [(1, 2, 4)]
    good = sample(7, [1, PAD, PAD], [0] * 3, grids)
    before = sample(6, [PAD, PAD, 1], [0] * 3, grids)
    with pytest.raises(DataError, match="sample 7: 3 image tokens, its 1 images make 2"):
        pack([before, sample(7, [1, PAD, PAD, PAD], [0] * 4, grids)])
    with pytest.raises(DataError, match="sample 7: an image's 2 tokens are not in one run"):
        pack([before, sample(7, [PAD, 1, PAD], [0] * 3, grids)])
    with pytest.raises(DataError, match=r"sample 7: .* its pixels have \[\(1, 4, 2\)\]"):
        pack([good], vision_of=lambda i: pixels(i, [(1, 4, 2)]))
    with pytest.raises(DataError, match=r"sample 7: .* its pixels have \[\]"):
        pack([good], vision_of=lambda i: None)


def test_per_token_values_of_some_samples_only_are_refused():
    with pytest.raises(AssertionError, match="old_logprobs"):
        pack([sample(0, [1, 2], [0, 1]), sample(1, [1, 2], [0, 1], old_logprobs=[0, -1])])


def test_nothing_packs_to_nothing():
    assert pack([]) == []


def test_a_prompts_tokens_are_marked_as_those_of_the_sample_before():
    prompt, mask = [1, 2, 3], [0, 0, 0]
    samples = [
        sample(4, [*prompt, 5], [*mask, 1]),
        sample(4, [*prompt, 6, 7], [*mask, 1, 1]),
        sample(7, [*prompt, 5], [*mask, 1]),
        sample(4, [*prompt, 8], [*mask, 1]),
    ]
    (batch,) = pack(samples, share_prompts=True, pad_multiple=16)
    assert batch.cu_seqlens.tolist() == [0, 4, 9, 13, 17, 32]
    assert batch.shared_tokens.tolist() == [0, 3, 0, 0, 0]  # the last one is not beside the others
    assert pack(samples)[0].shared_tokens is None
    # Tokens computed: 3 + 1 + 2 + 1 of prompt 4 and 4 of prompt 7.
    rows = [batch.sample_ids for batch in pack(samples, 7, share_prompts=True)]
    assert rows == [(0, 1, 3), (2,)]
    with pytest.raises(AssertionError, match="sample 4 has several prompts"):
        pack([samples[0], sample(4, [1, 2, 4, 6], [*mask, 1])], share_prompts=True)
