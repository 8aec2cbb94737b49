"""The digits: held-out ones are never trained on, errors have the stated rates."""

import itertools
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from megatron_sr1.data.shards import ShardReader
from megatron_sr1.demo import digits as digits_module
from megatron_sr1.demo.digits import (
    DESCRIPTION_NOISE,
    KINDS,
    QUESTIONS,
    SHIFT_PIXELS,
    SLIP_RATE,
    TURN_DEGREES,
    _cold_start,
    _draw_images,
    _moved,
    answer_from_digits,
    corpus_texts,
    make_digits,
    response,
)
from megatron_sr1.rewards.score import is_exact

SIZES = {"num_train": 200, "num_eval": 60, "num_cold_start": 900}


@pytest.fixture(scope="module")
def readers(tmp_path_factory):
    folders = make_digits(tmp_path_factory.mktemp("digits"), 5, **SIZES)
    return {name: ShardReader(folder) for name, folder in folders.items()}


@pytest.fixture(scope="module")
def unmoved(tmp_path_factory):
    """The same sets, with digits as they were written."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits_module, "SHIFT_PIXELS", 0)
        patch.setattr(digits_module, "TURN_DEGREES", 0.0)
        folders = make_digits(tmp_path_factory.mktemp("unmoved"), 5, **SIZES)
    return {name: ShardReader(folder) for name, folder in folders.items()}


def examples(reader):
    return [reader.example(i) for i in range(len(reader))]


def tiles(image):
    pixels = np.asarray(image)[:, :, 0]
    return [pixels[:, 28 * i : 28 * i + 28].tobytes() for i in range(3)]


def test_answers_by_hand():
    answers = [answer_from_digits(kind, (3, 7, 1)) for kind in KINDS]
    assert dict(zip(KINDS, answers, strict=True)) == {
        "sum": "11",
        "largest": "7",
        "smallest": "1",
        "leftmost": "3",
        "rightmost": "1",
    }


def test_responses_by_hand():
    said = {kind: response(kind, (3, 7, 1)).split(" </think>")[0] for kind in KINDS}
    assert said["sum"] == "<think> 3 + 7 = 10 + 1 = 11"
    assert said["largest"] == "<think> largest 3 7 1 = 7"
    slipped = response("sum", (3, 7, 1), (3, 8, 1), (9, 9, 9))
    assert slipped == (
        "<description> 3 8 1 </description> <think> 3 + 7 = 10 + 1 = 27 </think> \\boxed{27}"
    )


def described_digits(text):
    return [int(digit) for digit in re.findall("[0-9]", text)]


def test_a_description_is_exact_if_it_names_the_expected_items_in_order_and_no_others():
    assert is_exact(" 3 7 1 ", [3, 7, 1]) and is_exact("a 3, then 71", [3, 7, 1])
    assert not is_exact("3 7", [3, 7, 1]) and not is_exact("3 7 1 1", [3, 7, 1])
    assert not is_exact("three", [3, 7, 1]) and not is_exact("1 7 3", [3, 7, 1])
    assert is_exact("Red square, blue circle", ["red", "square", "blue", "circle"])
    assert not is_exact("red square", ["red", "square", "blue", "circle"])


def test_held_out_digits_are_never_trained_on(unmoved):
    learnt, held_out = ({d.tobytes() for tens in s for d in tens} for s in _draw_images())
    assert sum(map(len, _draw_images()[0])) == 1437 and sum(map(len, _draw_images()[1])) == 360
    assert not learnt & held_out
    for name, allowed in (("train", learnt), ("cold_start", learnt), ("eval", held_out)):
        reader = unmoved[name]
        seen = {t for i in range(len(reader)) for image in reader.images(i) for t in tiles(image)}
        assert seen and seen <= allowed


def test_only_training_digits_are_moved(readers, unmoved):
    written = {d.tobytes() for tens in _draw_images()[0] for d in tens}
    for name in ("train", "cold_start"):
        seen = [t for i in range(100) for image in readers[name].images(i) for t in tiles(image)]
        assert sum(t in written for t in seen) < 0.01 * len(seen)
    for i in range(SIZES["num_eval"]):
        assert readers["eval"].image_files(i) == unmoved["eval"].image_files(i)


def test_a_digit_is_shifted_and_turned_by_no_more_than_is_stated():
    bar = np.zeros((28, 28), np.uint8)
    bar[13:15, 4:24] = 255  # lies flat, in the middle
    rows, columns = np.mgrid[:28, :28] - 13.5
    shifts, turns = [], []
    rng = np.random.default_rng(0)
    for _ in range(500):
        weights = _moved(bar, rng).astype(float)
        weights /= weights.sum()
        across, down = (weights * columns).sum(), (weights * rows).sum()
        slope = (weights * (columns - across) * (rows - down)).sum()
        slope /= (weights * (columns - across) ** 2).sum()
        shifts += [across, down]
        turns.append(np.degrees(np.arctan(slope)))
    assert SHIFT_PIXELS - 0.5 < np.abs(shifts).max() < SHIFT_PIXELS + 0.5
    assert TURN_DEGREES - 1 < np.abs(turns).max() < TURN_DEGREES + 1
    assert abs(np.mean(shifts)) < 0.2 and abs(np.mean(turns)) < 1


def test_images_show_the_digits_of_the_metadata(unmoved):
    of_value = [{d.tobytes() for d in tens} for tens in _draw_images()[0]]
    reader = unmoved["train"]
    for example in examples(reader):
        (image,) = reader.images(example.index)
        assert image.size == (84, 28) and image.mode == "RGB"
        for tile, digit in zip(tiles(image), example.metadata["digits"], strict=True):
            assert tile in of_value[digit]


def test_questions_have_right_answers_and_every_kind(readers):
    for name in ("train", "eval"):
        for example in examples(readers[name]):
            meta = example.metadata
            assert example.question == "<image>" + QUESTIONS[meta["kind"]]
            assert example.answer == answer_from_digits(meta["kind"], meta["digits"])
        kinds = Counter(e.metadata["kind"] for e in examples(readers[name]))
        assert set(kinds) == set(KINDS)


def test_held_out_questions_do_not_depend_on_the_seed_or_their_number(readers, tmp_path):
    sizes = {"num_train": 20, "num_eval": 30, "num_cold_start": 20}
    other = {n: ShardReader(f) for n, f in make_digits(tmp_path, 6, **sizes).items()}
    for i in range(30):
        assert other["eval"].example(i).metadata == readers["eval"].example(i).metadata
        assert other["eval"].image_files(i) == readers["eval"].image_files(i)
    trains = [[r["train"].image_files(i) for i in range(20)] for r in (readers, other)]
    assert trains[0] != trains[1]


def test_the_same_seed_makes_the_same_shards(readers, tmp_path):
    again = make_digits(tmp_path, 5, **SIZES)
    for name, folder in again.items():
        (one,), other = folder.glob("*.tar"), Path(readers[name].example(0).shard)
        assert one.read_bytes() == other.read_bytes()


def test_only_descriptions_and_answers_are_wrong(readers):
    for example in examples(readers["cold_start"]):
        meta, text = example.metadata, example.messages[-1].content
        answer = answer_from_digits(meta["kind"], meta["answered"])
        assert text.endswith(f"= {answer} </think> \\boxed{{{answer}}}")
        thought = re.search(r"<think> (.*) = ", text).group(1)
        if meta["kind"] == "sum":
            first, second, partial, third = map(int, re.findall(r"\d+", thought))
            assert [first, second, third] == meta["digits"] and partial == first + second
        else:
            assert described_digits(thought) == meta["digits"]
        assert text.startswith("<description>") == (meta["format"] == "vision_sr1")
        assert meta["format"] != "reader" or meta["answered"] == meta["digits"]


def test_the_cold_start_is_wrong_and_asks_for_sums_by_the_stated_shares():
    dots = [[np.zeros((1, 1), np.uint8)]] * 10  # the picture does not matter here
    wrong, slips, sums = [], [], []
    for record in _cold_start(dots, np.random.default_rng(0), 5000):
        sums.append(record.metadata["kind"] == "sum")
        if record.metadata["format"] != "reader":
            slips.append(record.metadata["answered"] != record.metadata["digits"])
        description = re.search(r"<description> (.*) </description>", record.messages[-1].content)
        if description:
            pairs = zip(described_digits(description[1]), record.metadata["digits"], strict=True)
            wrong += [a != b for a, b in pairs]
    assert len(wrong) > 9000 and len(slips) > 3500
    for found, rate in ((wrong, DESCRIPTION_NOISE), (slips, SLIP_RATE), (sums, 1 / 3)):
        assert abs(np.mean(found) - rate) < 3 * (rate * (1 - rate) / len(found)) ** 0.5


def test_the_reader_reads_right_descriptions_without_an_image(readers):
    found = [e for e in examples(readers["cold_start"]) if e.metadata["format"] == "reader"]
    assert 0.15 < len(found) / SIZES["num_cold_start"] < 0.35
    for example in found:
        assert example.num_images == 0 and "<image>" not in example.question
        description = example.question.split("\n")[0]
        assert described_digits(description) == example.metadata["digits"]


def test_responses_are_short_in_tokens(tiny_model):
    from megatron_sr1.data.processor import Processor

    tokenizer = Processor(tiny_model, 784, 200704).tokenizer
    for kind in KINDS:
        first = tokenizer(response(kind, (9, 9, 1), (9, 9, 1)))["input_ids"]
        second = tokenizer(response(kind, (9, 9, 1)))["input_ids"]
        assert len(first) + 1 <= 23 and len(second) + 1 <= 18, (kind, len(first), len(second))


def test_the_corpus_holds_prompts_and_responses_but_no_image_mark():
    texts = list(itertools.islice(corpus_texts(), 100))
    assert len(texts) == 100 and not any("<image>" in t for t in texts)
    assert any(t.startswith("<description>") for t in texts)
    assert texts == list(itertools.islice(corpus_texts(), 100))
