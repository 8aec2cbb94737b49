"""Which folders are models and checkpoints, which are refused, and what is left of old ones."""

import io
import json
import pickle

import pytest
import torch

from megatron_sr1.checkpoint.folders import latest_step, read_state, resolve_model, write_state
from megatron_sr1.checkpoint.saving import remove_old, remove_remains
from megatron_sr1.checkpoint.untrusted import check_folder
from megatron_sr1.config.training import CheckpointConfig
from megatron_sr1.errors import CheckpointError


def make_step(folder, step, model=True):
    target = folder / f"step_{step}"
    (target / "hf_files").mkdir(parents=True)
    write_state(target, step, {}, None, {})
    (target / ".metadata").write_bytes(b"")
    if model:
        (target / "hf_files" / "config.json").write_text("{}")
    return target


def test_latest_names_the_step_to_resume_from(tmp_path):
    assert latest_step(tmp_path) is None
    for step in (5, 10):
        make_step(tmp_path, step)
    (tmp_path / "latest").write_text("step_5\n")
    assert latest_step(tmp_path) == 5


def test_remains_of_a_save_that_was_killed_are_no_checkpoint(tmp_path):
    make_step(tmp_path, 5)
    make_step(tmp_path, 9).rename(tmp_path / ".step_9.partial")
    (tmp_path / "step_7").mkdir()
    assert latest_step(tmp_path) == 5
    remove_remains(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_5", "step_7"]


def test_a_latest_that_leads_nowhere_is_an_error_that_names_the_complete_ones(tmp_path):
    make_step(tmp_path, 5)
    (tmp_path / "latest").write_text("step_6\n")
    with pytest.raises(CheckpointError, match=r"names 'step_6'.*\(step_5\)"):
        latest_step(tmp_path)


def test_the_last_checkpoints_are_kept_and_later_ones_left_alone(tmp_path):
    for step in (2, 4, 10, 20):
        make_step(tmp_path, step)
    remove_old(tmp_path / "step_10", CheckpointConfig(keep_last=2))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_10", "step_20", "step_4"]
    remove_old(tmp_path / "step_20", CheckpointConfig(keep_last=0))
    assert len(list(tmp_path.iterdir())) == 3


def test_both_kinds_of_model_directories_are_distinguished(tiny_model, tmp_path):
    assert resolve_model(tiny_model).kind == "huggingface"
    make_step(tmp_path, 3)
    for given in (tmp_path, tmp_path / "step_3"):
        found = resolve_model(given)
        assert (found.kind, found.weights) == ("megatron", tmp_path / "step_3")
        assert found.hf_files == tmp_path / "step_3" / "hf_files"


def test_the_error_for_a_directory_of_neither_kind_says_what_was_looked_for(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(CheckpointError, match=r"config.json.*latest.*found notes.txt"):
        resolve_model(tmp_path)
    with pytest.raises(CheckpointError, match="no such directory"):
        resolve_model(tmp_path / "absent")


def test_a_checkpoint_without_a_configuration_is_no_model(tmp_path):
    make_step(tmp_path, 3, model=False)
    with pytest.raises(CheckpointError, match="without hf_files/config.json"):
        resolve_model(tmp_path)


class Attack:
    """Unpickled by a plain reader, it would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_metadata_that_would_run_code_is_refused_without_running_it(tmp_path):
    mark = tmp_path / "owned"
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Attack(mark)))
    with pytest.raises(CheckpointError, match=r"\.metadata is refused: it names io.open"):
        check_folder(tmp_path)
    assert not mark.exists()
    pickle.loads((tmp_path / ".metadata").read_bytes())
    assert mark.exists(), "the attack itself does not work"


def metadata(path="__0_0.distcp", name=None, offset=0, length=8):
    from torch.distributed.checkpoint import metadata as records
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    tensor = records.TensorStorageMetadata(
        records.TensorProperties(torch.float32), torch.Size([2]), []
    )
    info = _StorageInfo(path, offset, length)
    return records.Metadata(
        state_dict_metadata={} if name else {"a": tensor},
        storage_data={records.MetadataIndex(name or "a"): info},
    )


def test_common_state_that_would_run_code_is_refused_without_running_it(tmp_path):
    mark = tmp_path / "owned"
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata()))
    torch.save({"a": Attack(mark)}, tmp_path / "common.pt")
    with pytest.raises(CheckpointError, match=r"common.pt is refused or damaged"):
        check_folder(tmp_path)
    assert not mark.exists()
    torch.save({"a": 1}, tmp_path / "common.pt")
    check_folder(tmp_path)


def test_metadata_may_not_point_outside_its_folder(tmp_path):
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata(path="../other/__0_0.distcp")))
    with pytest.raises(CheckpointError, match="outside its directory"):
        check_folder(tmp_path)


@pytest.mark.parametrize("name", ["common_state/shard_0_1", "rng/shard_0_1"])
def test_objects_among_the_tensors_are_refused_without_running_them(tmp_path, name):
    """Megatron-Core 0.19 keeps one there, which may hold plain values; any other is not ours."""
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata

    mark = tmp_path / "owned"

    def write(value):
        held = io.BytesIO()
        torch.save([value], held)
        (tmp_path / "__0_0.distcp").write_bytes(b"12345678" + held.getvalue())
        there = metadata(name=name, offset=8, length=len(held.getvalue()))
        there.state_dict_metadata[name] = BytesStorageMetadata()
        (tmp_path / ".metadata").write_bytes(pickle.dumps(there))

    write(Attack(mark))
    with pytest.raises(CheckpointError, match=name):
        check_folder(tmp_path)
    assert not mark.exists()
    write({"step": 3})
    if name.startswith("common"):
        check_folder(tmp_path)
    else:
        with pytest.raises(CheckpointError, match="an object and not a tensor"):
            check_folder(tmp_path)


def test_a_cut_off_metadata_is_an_error_of_ours(tmp_path):
    whole = pickle.dumps(metadata())
    (tmp_path / ".metadata").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="damaged"):
        check_folder(tmp_path)


def test_state_of_another_format_is_refused(tmp_path):
    step = make_step(tmp_path, 1)
    (step / "state.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(CheckpointError, match="format 99 came, expected 1 to 2"):
        read_state(step)
