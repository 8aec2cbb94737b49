"""Data sets of the hub: snapshots in its cache, as published, become shards without a network."""

import sys

import datasets
import pytest
from huggingface_hub import constants

from megatron_sr1.data.guards import inside
from megatron_sr1.data.ingest import Conversion, make_shards
from megatron_sr1.data.shards import ShardReader
from megatron_sr1.data.sources import open_source
from megatron_sr1.data.tally import Tally
from megatron_sr1.errors import DataError
from megatron_sr1.runtime import hub
from tests.hub_files import add_snapshot
from tests.pictures import png
from tools.make_shards import main

NAME = "lab/geometry"
CARD = """---
dataset_info:
- config_name: default
  splits:
  - name: train
    num_examples: {train}
  - name: test
    num_examples: 3
configs:
- config_name: default
  data_files:
  - split: train
    path: data/train-*
  - split: test
    path: data/test-*
- config_name: small
  data_files:
  - split: test
    path: data/test-*
---
"""


def numbered(number):
    return png((number, 0, 0))


def parquet(path, first, count):
    """Rows as the library itself publishes them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kinds = {"images": datasets.List(datasets.Image()), "problem": datasets.Value("string")}
    kinds["answer"] = datasets.Value("string")
    rows = range(first, first + count)
    columns = {
        "images": [[{"bytes": numbered(i), "path": None}] for i in rows],
        "problem": [f"<image>Find {i}." for i in rows],
        "answer": [str(i) for i in rows],
    }
    datasets.Dataset.from_dict(columns, features=datasets.Features(kinds)).to_parquet(str(path))


@pytest.fixture
def home(tmp_path, monkeypatch):
    """HF_HOME, for both libraries of this process."""
    datasets.disable_progress_bars()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "home" / "datasets"))
    hub._find.cache_clear()
    yield tmp_path / "home"
    hub._find.cache_clear()


@pytest.fixture
def snapshot(home, tmp_path):
    """A data set of two parquet files in one split, another split and a second configuration."""
    parquet(tmp_path / "set" / "data" / "train-00000-of-00002.parquet", 0, 6)
    parquet(tmp_path / "set" / "data" / "train-00001-of-00002.parquet", 6, 4)
    parquet(tmp_path / "set" / "data" / "test-00000-of-00001.parquet", 100, 3)
    (tmp_path / "set" / "README.md").write_text(CARD.format(train=10))
    return add_snapshot(home, NAME, tmp_path / "set", kind="dataset")


def test_a_data_set_by_name_gives_the_shards_of_its_files(snapshot, tmp_path, capsys):
    assert main([f"hf:{NAME}@train", str(tmp_path / "out"), "--samples-per-shard", "4"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'out'}: 10 samples, 0 skipped\n"
    reader = ShardReader(tmp_path / "out")
    assert [reader.example(i).question for i in range(10)] == [
        f"<image>Find {i}." for i in range(10)
    ]
    assert reader.example(7).golds == ("7",) and reader.image_files(7) == [numbered(7)]
    (tmp_path / "files").mkdir()
    for path in (snapshot / "data").glob("train-*"):
        (tmp_path / "files" / path.name).write_bytes(path.read_bytes())
    own = [str(tmp_path / "files"), str(tmp_path / "same"), "--samples-per-shard", "4"]
    assert main(own) == 0
    for tar in (tmp_path / "out").glob("*.tar"):
        assert tar.read_bytes() == (tmp_path / "same" / tar.name).read_bytes()


@pytest.mark.parametrize(("source", "count"), [("@test", 3), (":small@test", 3)])
def test_split_and_configuration_are_named(snapshot, tmp_path, source, count):
    assert main([f"hf:{NAME}{source}", str(tmp_path / "out")]) == 0
    reader = ShardReader(tmp_path / "out")
    assert (len(reader), reader.example(0).answer) == (count, "100")


@pytest.mark.parametrize(
    ("source", "told"),
    [
        (f"hf:{NAME}@val", f"hf:{NAME}@val: no split 'val'; it has train, test"),
        (f"hf:{NAME}:big@train", f"hf:{NAME}:big@train: not readable by datasets: "),
        (f"hf:{NAME}", "expected hf:OWNER/NAME@SPLIT or hf:OWNER/NAME:CONFIG@SPLIT"),
        ("hf:geometry@train", "expected hf:OWNER/NAME@SPLIT"),
        ("hf:lab/none@train", "with HF_HOME on a file system that this machine sees: hf download "),
        ("hf:lab/none@train", "hf download lab/none --repo-type dataset\n"),
    ],
)
def test_what_is_not_there_is_one_clear_error(snapshot, tmp_path, capsys, source, told):
    assert main([source, str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("make_shards: ") and told in error and error.count("\n") == 1


def test_without_the_library_the_error_says_how_to_install_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert main([f"hf:{NAME}@train", str(tmp_path / "out")]) == 1
    told = "the library datasets is not installed; pip install 'megatron_sr1[hub]', or pip install"
    assert told in capsys.readouterr().err


def test_rows_that_were_not_downloaded_are_noticed(snapshot, home, tmp_path, capsys):
    (tmp_path / "set" / "README.md").write_text(CARD.format(train=12))
    add_snapshot(home, NAME, tmp_path / "set", kind="dataset")
    assert main([f"hf:{NAME}@train", str(tmp_path / "out")]) == 1
    assert "10 rows in" in (error := capsys.readouterr().err) and "its card says 12" in error
    with pytest.raises(DataError, match="cut short|no .tar shards"):
        ShardReader(tmp_path / "out")


def test_an_interrupted_call_goes_on_in_the_data_set(snapshot, tmp_path):
    class Stopped(Exception):
        pass

    def make(out, last=None):
        def watch(tally):
            seen.append(tally.rows)
            if tally.rows == last:
                raise Stopped

        seen: list[int] = []
        source = open_source(f"hf:{NAME}@train")
        assert source.num_rows == 10
        try:
            own = {"samples_per_shard": 4, "watch": watch}
            make_shards(source, tmp_path / out, Conversion(), Tally(say=print), **own)
        except Stopped:
            pass
        return seen[0]

    assert [make("out", 7), make("out"), make("whole")] == [0, 4, 0]
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()


def test_images_beside_metadata_are_found_through_the_links_of_a_snapshot(home, tmp_path):
    (tmp_path / "set").mkdir()
    for number in range(2):
        (tmp_path / "set" / f"{number}.png").write_bytes(numbered(number))
    rows = "".join(
        f'{{"file_name": "{i}.png", "problem": "which?", "answer": "{i}"}}\n' for i in range(2)
    )
    (tmp_path / "set" / "metadata.jsonl").write_text(rows)
    snapshot = add_snapshot(home, "lab/folder", tmp_path / "set", kind="dataset")
    for source, out in (("hf:lab/folder@train", "a"), (str(snapshot), "b")):
        assert main([source, str(tmp_path / out), "--max-skipped", "0"]) == 0
        assert [ShardReader(tmp_path / out).image_files(i) for i in range(2)] == [
            [numbered(0)],
            [numbered(1)],
        ]


def test_a_snapshot_may_link_to_its_blobs_and_nowhere_else(snapshot, tmp_path):
    assert inside(snapshot, "README.md").is_file()
    (tmp_path / "secret").write_text("")
    (snapshot / "link").symlink_to(tmp_path / "secret")
    (snapshot.parent.parent / "refs" / "secret").symlink_to(tmp_path / "secret")
    for name in ("link", "../../refs/main", "../../../other", "../../blobs/../refs/secret"):
        with pytest.raises(DataError, match="leads out of"):
            inside(snapshot, name)
