"""Shards: what is written is read back, by number and by a stock webdataset reader."""

import io
import json
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import webdataset
from PIL import Image

from megatron_sr1.data.examples import Record
from megatron_sr1.data.shard_index import index_path, scan
from megatron_sr1.data.shards import DATASET_FILE, ShardReader, write_shards
from megatron_sr1.errors import DataError
from megatron_sr1.records import Message


def picture(number, size=(20, 12), kind="PNG"):
    pixels = np.random.default_rng(number).integers(256, size=(*size[::-1], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=kind)
    return buffer.getvalue()


def record(number):
    images = tuple(
        picture(10 * number + i, kind="JPEG" if i == 1 else "PNG") for i in range(number % 3)
    )
    text = "<image>" * len(images) + f"Wie groß ist № {number}?"
    return Record((Message("user", text),), str(number), images, {"problem_id": number})


@pytest.fixture
def folder(tmp_path):
    assert write_shards((record(i) for i in range(11)), tmp_path, samples_per_shard=4) == 11
    return tmp_path


def tars(folder):
    return sorted(folder.glob("*.tar"))


def test_every_sample_is_read_back_by_its_number_with_its_original_bytes(folder):
    reader = ShardReader(folder)
    assert len(reader) == 11 and len(tars(folder)) == 3
    for number in np.random.default_rng(0).permutation(11).tolist():
        example, wanted = reader.example(number), record(number)
        assert (example.index, example.messages) == (number, wanted.messages)
        assert (example.answer, example.metadata) == (wanted.answer, wanted.metadata)
        assert reader.image_files(number) == list(wanted.images)
        for image, data in zip(reader.images(number), wanted.images, strict=True):
            assert image.mode == "RGB"
            assert image.tobytes() == Image.open(io.BytesIO(data)).convert("RGB").tobytes()


@pytest.mark.parametrize("number", [-1, 11])
def test_a_number_outside_the_dataset_is_refused(folder, number):
    with pytest.raises(IndexError, match="of 11"):
        ShardReader(folder).example(number)


def test_a_stock_webdataset_reader_streams_the_same_samples(folder):
    stream = webdataset.WebDataset([str(t) for t in tars(folder)], shardshuffle=False)
    samples = list(stream)
    assert len(samples) == 11
    for number, sample in enumerate(samples):
        assert json.loads(sample["json"])["answer"] == str(number)
        for position, data in enumerate(record(number).images):
            assert sample[f"{position}.{'jpeg' if position == 1 else 'png'}"] == data


def test_shards_of_a_stock_webdataset_writer_are_read(tmp_path):
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as sink:
        for number in range(3):
            text = {"messages": [{"role": "user", "content": f"<image>{number}?"}], "num_images": 1}
            key = f"train/{number}"
            sink.write({"__key__": key, "json": text, "jpg": picture(number, kind="JPEG")})
    reader = ShardReader(tmp_path)
    assert [reader.example(i).question for i in range(3)] == [f"<image>{i}?" for i in range(3)]
    assert reader.images(1)[0].size == (20, 12)


def test_the_same_samples_make_the_same_files(folder, tmp_path_factory):
    again = tmp_path_factory.mktemp("again")
    write_shards((record(i) for i in range(11)), again, samples_per_shard=4)
    for one, other in zip(tars(folder), tars(again), strict=True):
        assert one.read_bytes() == other.read_bytes()


def test_the_written_index_is_what_the_tar_headers_say(folder):
    for tar in tars(folder):
        rows = json.loads(index_path(tar).read_text())["samples"]
        assert [r[0] for r in rows] == [p.key for p in scan(tar)]
        assert rows == json.loads(json.dumps([(p.key, p.text, p.images) for p in scan(tar)]))


@pytest.mark.parametrize("harm", ["missing", "older", "broken", "other size"])
def test_an_index_that_does_not_fit_is_rebuilt(folder, harm):
    tar = tars(folder)[1]
    index = index_path(tar)
    value = json.loads(index.read_text())
    value["samples"] = value["samples"][::-1]  # would give the wrong samples if it were used
    if harm == "missing":
        index.unlink()
    elif harm == "broken":
        index.write_text("{")
    elif harm == "older":
        index.write_text(json.dumps(value))
        os.utime(index, ns=(0, tar.stat().st_mtime_ns - 1))
    else:
        index.write_text(json.dumps({**value, "tar_bytes": value["tar_bytes"] + 512}))
    assert [ShardReader(folder).example(i).answer for i in (4, 7)] == ["4", "7"]
    assert json.loads(index.read_text())["samples"][0][0] == "000000004"


def test_a_truncated_shard_is_named_with_the_sample(folder):
    tar = tars(folder)[2]
    place = scan(tar)[-1]
    with open(tar, "r+b") as file:
        file.truncate(place.text[0] + 3)
    index = index_path(tar)  # an index as new and for that size: the read itself must notice
    value = json.loads(index.read_text())
    index.write_text(json.dumps({**value, "tar_bytes": tar.stat().st_size}))
    with pytest.raises(DataError, match=r"000002.tar byte \d+: sample 000000010: 3 of \d+ bytes"):
        ShardReader(folder).example(10)


def test_a_broken_image_is_named_with_shard_sample_and_position(folder):
    tar = tars(folder)[0]
    offset, size = scan(tar)[2].images[1]
    with open(tar, "r+b") as file:
        file.seek(offset)
        file.write(b"\0" * size)
    with pytest.raises(DataError, match="shard-000000.tar sample 000000002: image 1"):
        ShardReader(folder).images(2)


def test_a_missing_shard_is_noticed(folder):
    tars(folder)[1].unlink()
    with pytest.raises(DataError, match="shard-000001.tar"):
        ShardReader(folder)


def test_writing_that_was_cut_short_is_refused_and_can_be_done_again(tmp_path):
    def failing():
        yield from (record(i) for i in range(10))
        raise DataError("source broke")

    with pytest.raises(DataError, match="source broke"):
        write_shards(failing(), tmp_path, samples_per_shard=4)
    with pytest.raises(DataError, match="cut short"):
        ShardReader(tmp_path)
    write_shards((record(i) for i in range(3)), tmp_path)
    assert len(ShardReader(tmp_path)) == 3


def test_finished_shards_are_not_overwritten(folder):
    with pytest.raises(DataError, match="already holds shards"):
        write_shards([record(0)], folder)
    assert len(ShardReader(folder)) == 11


def test_an_empty_directory_is_refused_with_the_tool_to_run(tmp_path):
    with pytest.raises(DataError, match="make_shards"):
        ShardReader(tmp_path)
    assert json.loads(json.dumps(DATASET_FILE)) == "dataset.json"


def test_threads_and_forks_share_a_reader(folder):
    reader = ShardReader(folder)
    reader.example(0)  # files are open before the fork

    def read(seed):
        numbers = np.random.default_rng(seed).integers(11, size=300).tolist()
        return [n for n in numbers if reader.example(n).answer != str(n)]

    child = os.fork()
    if child == 0:
        try:
            os._exit(len(read(99)) > 0)
        finally:
            os._exit(2)
    with ThreadPoolExecutor(4) as pool:
        assert [*pool.map(read, range(4))] == [[]] * 4
    assert os.waitpid(child, 0)[1] == 0
