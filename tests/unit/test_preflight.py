"""Wrong paths that a newcomer gives: the message says what came and what to give instead."""

import dataclasses

import pytest

from megatron_sr1.config.run import Config
from megatron_sr1.errors import CheckpointError, ConfigError, DataError
from megatron_sr1.launch.preflight import check_paths
from megatron_sr1.runtime.failure import guard

pytestmark = pytest.mark.field


@pytest.fixture
def folder(tmp_path):
    """A model, a run, shards of two kinds, and what a newcomer takes for them."""
    for name in (
        "model",
        "old",
        "bare",
        "run/hf",
        "run/checkpoints",
        "shards/train",
        "shards/eval",
    ):
        (tmp_path / name).mkdir(parents=True)
    for name in ("model", "old", "bare", "run/hf"):
        (tmp_path / name / "config.json").touch()
    (tmp_path / "model" / "model.safetensors").touch()
    (tmp_path / "run" / "hf" / "model.safetensors").touch()
    (tmp_path / "old" / "pytorch_model.bin").touch()
    for name in ("train", "eval"):
        (tmp_path / "shards" / name / "shard-0.tar").touch()
    return tmp_path


def config(folder, model="model", train="shards/train", output="out"):
    made = Config(stage="sft", output=str(folder / output))
    made = dataclasses.replace(
        made, model=dataclasses.replace(made.model, path=f"{folder}/{model}")
    )
    return dataclasses.replace(made, data=dataclasses.replace(made.data, train=f"{folder}/{train}"))


def test_what_is_right_is_accepted(folder):
    check_paths(config(folder))
    check_paths(config(folder, model="run/hf"))


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ("nothing", "no such directory"),
        ("run", "this is a run, try {}/run/hf"),
        ("bare", "this has config.json and no weights"),
        ("old", "weights in pytorch_model.bin only, which are not read"),
        ("shards/train", "this has shards: a directory for data.train"),
        ("model/model.safetensors", "this is a file, try {}/model"),
    ],
)
def test_a_path_that_is_no_model_says_what_it_is(folder, model, told):
    with pytest.raises(CheckpointError) as error:
        check_paths(config(folder, model=model))
    assert f"model.path={folder}/{model}" in str(error.value)
    assert str(error.value).endswith(told.format(folder)) or told in str(error.value)


@pytest.mark.parametrize(
    ("train", "told"),
    [
        ("nothing", "no such directory (tools/make_shards.py writes shards)"),
        ("model", "holds no *.tar shard (tools/make_shards.py writes shards)"),
        ("shards", "holds no *.tar shard; there are some in {0}/shards/eval, {0}/shards/train"),
        ("shards/train/shard-0.tar", "is a file; name the directory of its shards"),
    ],
)
def test_a_path_that_holds_no_shards_says_where_there_are_some(folder, train, told):
    with pytest.raises(DataError) as error:
        check_paths(config(folder, train=train))
    assert told.format(folder) in str(error.value)


def test_a_relative_path_says_from_where_and_the_demos_what_makes_it(folder, monkeypatch):
    monkeypatch.chdir(folder)
    absent = config(folder)
    for path, told in (
        (
            "runs/demo/cold_start/hf",
            f"no such directory in {folder}, which make demo creates; give",
        ),
        ("models/old/qwen", f"no such directory in {folder}; give"),
        ("models/qwen", f"no such directory in {folder}, and as a name on the hub: models/qwen"),
    ):
        with pytest.raises(CheckpointError) as error:
            check_paths(
                dataclasses.replace(absent, model=dataclasses.replace(absent.model, path=path))
            )
        assert told in str(error.value)


def test_a_rank_that_cannot_make_its_run_directory_says_so_in_one_line(folder):
    with (
        pytest.raises(ConfigError, match=r"cannot be written to \(Not a directory: .*; choose a"),
        guard(folder / "model" / "config.json" / "run"),
    ):
        pass
