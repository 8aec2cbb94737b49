"""The targets of fuzzing: a hypothesis strategy each, and a property of its values.

`tools/fuzz.py` runs them for an hour with random choices, `test_properties.py` for seconds with
fixed ones. Each target is a hypothesis strategy and a property over its values; the code under
test is the package's own. What a target may raise is `DataError`, with one line of text.
"""

import contextlib
import io
import json
import os
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
from hypothesis import strategies as st

from megatron_sr1.data.examples import (
    ESCAPED_MARK,
    IMAGE_MARK,
    Record,
    count_marks,
    example_from_stored,
)
from megatron_sr1.data.guards import is_json
from megatron_sr1.data.images import MAX_ASPECT_RATIO, MAX_IMAGE_PIXELS, decode_image
from megatron_sr1.data.packing import PER_TOKEN, cost, pack_samples, plan_rows, size_of
from megatron_sr1.data.prompts import strip_image_marks
from megatron_sr1.data.rows import record_from_row
from megatron_sr1.data.shard_index import index_path
from megatron_sr1.data.shards import ShardReader, write_shards
from megatron_sr1.errors import DataError
from megatron_sr1.records import Message, TrainSample
from megatron_sr1.rewards.response import (
    RECIPES,
    find_answer,
    find_boxed,
    find_description,
    has_format,
)
from tests.hostile.mutations import (
    EDITS,
    VALID_IMAGES,
    mutated,
    picture,
    repaired_headers,
    repaired_index,
    repaired_png,
)

PAD = 9
SECONDS_A_CASE = 5.0
"""Far more than any case takes on a busy machine, far less than quadratic time would."""


@contextlib.contextmanager
def refused_or_right():
    """A DataError is a right answer, if it says so in one line without control characters."""
    try:
        yield
    except DataError as error:
        text = str(error)
        assert text.isprintable() and len(text) < 1500, f"not one line: {text[:200]!r}"


@contextlib.contextmanager
def in_time(what, seconds=SECONDS_A_CASE):
    """Fail what took too long; processor time, so that a busy machine does not count."""
    started = time.process_time()
    yield
    taken = time.process_time() - started
    assert taken < seconds, f"{what} took {taken:.1f} s"


# Parsing

PIECES = st.sampled_from(
    [
        *("<description>", "</description>", "<think>", "</think>", "\\boxed{", "\\boxed  {"),
        *("{", "}", "\\{", "\\}", "\\", " ", "\n", "\t", "7", "x", "<image>", "<", "</", "\\boxed"),
        *("</ think>", "<Description>", "\u2028", "\x00", "é", "\ud800", "<|im_end|>", "$", "."),
    ]
)
TEXTS = st.one_of(
    st.lists(PIECES, max_size=40).map("".join),
    st.text(max_size=80),
    st.tuples(PIECES, st.integers(0, 20000), PIECES).map(lambda p: p[0] * p[1] + p[2]),
    st.tuples(PIECES, PIECES, st.integers(0, 10000)).map(lambda p: (p[0] + p[1]) * p[2]),
)


def check_parsing(text):
    """Spans are substrings, a description stays as the text grows, nothing raises or is slow."""
    with in_time("parsing"):
        description, answer, boxed = find_description(text), find_answer(text), find_boxed(text)
        forms = {recipe: has_format(text, recipe) for recipe in RECIPES}
        without = strip_image_marks(text)
    assert description is None or (description in text and description == description.strip() != "")
    assert answer is None or (answer in text and answer == answer.strip() != "")
    if boxed is not None:
        assert text[boxed.start : boxed.end].endswith(boxed.content + "}")
    if any(forms.values()):
        assert answer is not None
        assert description is not None or not (forms["vision_sr1"] or forms["see_think"])
    assert IMAGE_MARK not in without or ESCAPED_MARK in text or "<image<image>" in text
    for cut in (len(text) // 3, len(text) // 2, len(text) - 1):
        earlier = find_description(text[: max(cut, 0)])
        assert earlier is None or earlier == description, "a description changed as the text grew"


# Packing


@st.composite
def packings(draw):
    """(samples, budget, padding) with images laid out as the processor lays them out."""
    samples = []
    extra = draw(st.sets(st.sampled_from(PER_TOKEN)))
    for index in range(draw(st.integers(0, 12))):
        grids = draw(
            st.lists(
                st.tuples(st.just(1), st.integers(1, 4), st.integers(1, 4)).map(
                    lambda g: (1, 2 * g[1], 2 * g[2])
                ),
                max_size=3,
            )
        )
        ids = draw(st.lists(st.integers(10, 99), min_size=1, max_size=20))
        for t, h, w in grids:
            ids += [PAD] * (t * h * w // 4) + draw(
                st.lists(st.integers(10, 99), min_size=1, max_size=6)
            )
        if draw(st.integers(0, 30)) == 30:  # a policy that sampled an image token
            ids.append(PAD)
        size = len(ids)
        learnt = draw(st.lists(st.booleans(), min_size=size - 1, max_size=size - 1))
        mask = np.array([False, *learnt])
        values = {n: np.arange(size, dtype=np.float32) + 1000 * index + 1 for n in extra}
        samples.append(
            TrainSample(index, len(grids), np.array(ids, np.int64), mask, tuple(grids), **values)
        )
    return samples, draw(st.integers(1, 200)), draw(st.integers(1, 16))


def check_packing(given):
    """Every token once, borders rising, nothing across a border, rows within the budget."""
    samples, budget, multiple = given
    sizes = [size_of(s) for s in samples]
    for row in plan_rows(sizes, budget, 0.5):
        assert len(row) == 1 or cost((sizes[n] for n in row), 0.5) <= budget
    with refused_or_right():
        batches = pack_samples(
            samples, budget, None, image_pad_id=PAD, merge_size=2, pad_multiple=multiple
        )
        packed = sorted(i for batch in batches for i in batch.sample_ids)
        assert packed == list(range(len(samples)))
        for batch in batches:
            _check_row(batch, samples, multiple)


def _check_row(batch, samples, multiple):
    borders = batch.cu_seqlens.tolist()
    total = batch.input_ids.shape[1]
    assert borders[0] == 0 and borders[-1] == total and total % multiple == 0
    assert all(a < b for a, b in zip(borders, borders[1:], strict=False))
    assert len(borders) - 1 - len(batch.sample_ids) in (0, 1)
    for number, index in enumerate(batch.sample_ids):
        a, b = borders[number], borders[number + 1]
        sample = samples[index]
        assert batch.input_ids[0, a:b].tolist() == sample.token_ids.tolist()
        assert batch.labels[0, a:b].tolist() == [*sample.token_ids[1:].tolist(), 0]
        assert batch.loss_mask[0, a:b].tolist() == [*sample.loss_mask[1:].astype(float), 0]
        assert batch.position_ids[:, 0, a].tolist() == [0, 0, 0]
        assert int(batch.position_ids[:, 0, a:b].min()) == 0
        for name in PER_TOKEN:
            if getattr(sample, name) is not None:
                values = getattr(batch, name)[0, a:b].tolist()
                assert values == [*getattr(sample, name)[1:].tolist(), 0]
    used = borders[len(batch.sample_ids)]
    assert not batch.loss_mask[0, used:].any() and not batch.input_ids[0, used:].any()


# Images


IMAGES = st.tuples(st.integers(0, len(VALID_IMAGES) - 1), EDITS, st.booleans())


def check_image(given):
    """An image within the limits or a DataError, in time."""
    number, edits, repair = given
    data = mutated(VALID_IMAGES[number], edits)
    data = repaired_png(data) if repair else data
    with refused_or_right(), in_time("decoding", 30.0):
        image = decode_image(data)
        width, height = image.size
        assert image.mode == "RGB" and 0 < width * height <= MAX_IMAGE_PIXELS
        assert max(width, height) <= MAX_ASPECT_RATIO * min(width, height)


# Examples

LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=12),
    st.sampled_from(["<image>", "<image>q", "user", "human", "assistant", "a.png", "\ud800"]),
    st.sampled_from(
        ["/dev/zero", "file:///x", "http://x/y.png", "../a.png", "\0", "a\nb", "x" * 5000]
    ),
    st.binary(max_size=12),
    st.sampled_from(VALID_IMAGES),
)
NAMES = st.sampled_from(
    [
        *("problem", "question", "answer", "solution", "images", "image", "messages", "metadata"),
        *("conversations", "instruction", "input", "output", "role", "content", "from", "value"),
        *("bytes", "path", "num_images", "x", "system", "history", "prompt", "reward_model"),
        *("ground_truth", "type", "text", "url", "image_url", "other_answers"),
    ]
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(NAMES, inner, max_size=4)),
    max_leaves=12,
)
TURNS = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system", "x\ny"]), "content": LEAVES}
    ),
    max_size=4,
)
USUAL = [
    {"problem": "q", "answer": "1"},
    {"question": "<image>q", "solution": 2.5, "image": "a.png", "x": [1, {"y": None}]},
    {"problem": "a<image>b<image>", "answer": "x", "images": [VALID_IMAGES[1], {"path": "a.png"}]},
    {"instruction": "i", "input": "", "output": "o"},
    {
        "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
        "num_images": 0,
        "answer": None,
        "metadata": {"n": 1},
    },
    {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    {"messages": [{"role": "user", "content": "<image>q"}], "num_images": 1, "images": ["a.png"]},
    {
        "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "q"}]}],
        "reward_model": {"ground_truth": ["1", "2"]},
        "images": ["a.png"],
    },
    {"instruction": "i", "output": "o", "system": "s", "history": [["q", "a"]]},
]
ROWS = st.one_of(
    st.tuples(st.sampled_from(USUAL), st.dictionaries(NAMES, LEAVES, max_size=1)).map(
        lambda pair: {**pair[0], **pair[1]}
    ),
    st.tuples(st.sampled_from(USUAL), st.text(max_size=30), st.text(max_size=9)).map(
        lambda t: (
            {k: v + t[1] if k in ("problem", "question") else v for k, v in t[0].items()}
            | {"x": t[2]}
        )
    ),
    st.dictionaries(NAMES, VALUES, max_size=7),
    st.fixed_dictionaries(
        {"messages": st.one_of(TURNS, VALUES), "num_images": st.one_of(st.integers(0, 3), LEAVES)},
        optional={"answer": VALUES, "metadata": VALUES, "images": VALUES},
    ),
)


def check_example(row):
    """A row, and the same as stored JSON: a record or an example that can be used, or refused."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "a.png").write_bytes(VALID_IMAGES[3])
        with refused_or_right(), in_time("a row"):
            record = record_from_row(row, Path(folder), columns={})
            assert write_shards([record], Path(folder) / "out") == 1
            reader = ShardReader(Path(folder) / "out")
            example = reader.example(0)
            _check_example(example)
            assert (example.messages, example.answer) == (record.messages, record.answer)
            assert example.other_answers == record.other_answers
            assert reader.image_files(0) == list(record.images)
            assert len(reader.images(0)) == example.num_images
    with refused_or_right(), in_time("a stored sample"):
        _check_example(example_from_stored(row, index=0, key="k", shard="s.tar"))


def _check_example(example):
    assert all(type(m.content) is str and m.content.encode() is not None for m in example.messages)
    assert {m.role for m in example.messages} <= {"system", "user", "assistant"}
    assert count_marks(example.messages) == example.num_images
    assert example.answer is None or type(example.answer) is str
    assert is_json("metadata", dict(example.metadata)) and "user" in {
        m.role for m in example.messages
    }


# Shards


def valid_shards():
    """Files of a folder of shards, by name, and of one that another writer left."""
    records = [
        Record((Message("user", "<image>" * (n % 3) + f"q{n}"),), str(n), images, {"n": n})
        for n in range(5)
        for images in [tuple(picture("PNG", size=(4 + n + i, 3)) for i in range(n % 3))]
    ]
    with tempfile.TemporaryDirectory() as folder:
        write_shards(records, folder, samples_per_shard=3)
        ours = {p.name: p.read_bytes() for p in Path(folder).iterdir()}
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for n in range(3):
            text = {"messages": [{"role": "user", "content": f"<image>{n}"}], "num_images": 1}
            for end, data in (("jpg", picture("JPEG")), ("json", json.dumps(text).encode())):
                member = tarfile.TarInfo(f"é{'long/' * 22}{n}.{end}")
                member.size, member.mtime = len(data), 1.5
                tar.addfile(member, io.BytesIO(data))
    return [ours, {"other.tar": buffer.getvalue()}]


VALID_SHARDS = valid_shards()
SHARDS = st.tuples(
    st.integers(0, len(VALID_SHARDS) - 1),
    st.integers(0, 9),
    EDITS,
    st.sampled_from(["as it is", "headers fixed", "no index", "no dataset.json", "index fixed"]),
)


def check_shards(given):
    """Only DataErrors, or samples of the right form; where only an index lies, the right ones."""
    number, which, edits, how = given
    files = dict(VALID_SHARDS[number])
    name = sorted(files)[which % len(files)]
    is_tar = name.endswith(".tar")
    data = mutated(files[name], edits)
    if how == "headers fixed" and is_tar:
        data = repaired_headers(data)
    if how == "index fixed" and name.endswith("index.json"):
        data = repaired_index(data)
    files[name] = data
    if how == "no dataset.json":
        files.pop("dataset.json", None)
    with tempfile.TemporaryDirectory() as folder:
        for file, content in sorted(files.items()):
            (Path(folder) / file).write_bytes(content)
        for index in Path(folder).glob("*.index.json"):  # new enough to be looked at
            os.utime(index)
            if how == "no index":
                index.unlink()
        with in_time("reading a folder of shards", 30.0):
            _read_all(folder, check_answers=not is_tar, strict="dataset.json" in files)


def _read_all(folder, check_answers, strict):
    with refused_or_right():
        reader = ShardReader(folder)
        assert len(reader) <= 16
        for index in range(len(reader)):
            with refused_or_right():
                example = reader.example(index)
                _check_example(example)
                if check_answers and strict and example.answer is not None:
                    assert example.answer == str(index), "another sample than the one asked for"
                images = reader.images(index)
                assert len(images) == example.num_images
                if check_answers and example.answer is not None:
                    wanted = [(4 + int(example.answer) + i, 3) for i in range(len(images))]
                    assert [image.size for image in images] == wanted, "another sample's image"
        for tar in Path(folder).glob("*.tar"):
            assert not index_path(tar).name.endswith(".part")


TARGETS = {
    "parsing": (TEXTS, check_parsing),
    "packing": (packings(), check_packing),
    "shards": (SHARDS, check_shards),
    "examples": (ROWS, check_example),
    "images": (IMAGES, check_image),
}
"""Name of a target -> (strategy of its inputs, property that they must have)."""
