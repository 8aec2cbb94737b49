"""A checkpoint that is not as it was saved is refused, and what is on the disk comes before names.

Not covered here: several ranks (tests/distributed/test_checkpoint_faults.py).
"""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from megatron_sr1.checkpoint.disk import measure, read_manifest
from megatron_sr1.checkpoint.folders import fingerprint, latest_step, resolve_model
from megatron_sr1.checkpoint.loading import load_model
from megatron_sr1.errors import CheckpointError
from tests.checkpoint_run import fill, held, load, make_run, save


@pytest.fixture(scope="module")
def actor(tiny_model, groups):
    return make_run(tiny_model, groups)


@pytest.fixture(scope="module")
def saved(actor, groups, tiny_model, tmp_path_factory):
    """Two checkpoints; the weights of step N are all N."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    for step in (2, 4):
        fill(actor, step)
        save(actor, groups, folder, step, tiny_model)
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


def tensor_file(folder, step=4):
    return max((folder / f"step_{step}").glob("*.distcp"), key=lambda p: p.stat().st_size)


def flip(path, at=None):
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if at is None else at] ^= 1
    path.write_bytes(data)


def test_every_file_is_in_the_manifest_with_its_digest(saved):
    step = saved / "step_4"
    there = {p.relative_to(step).as_posix() for p in step.rglob("*") if p.is_file()}
    expected = read_manifest(step)
    assert there - {"manifest.json"} == set(expected)
    assert {"state.json", "common.pt", ".metadata", "rng_0.pt"} < set(expected)
    for name, recorded in expected.items():
        assert measure(step / name) == recorded


def test_an_untouched_checkpoint_loads(actor, groups, copy):
    fill(actor, 9)
    assert load(actor, groups, copy) == {"n": 4}
    assert held(actor) == 4


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda path: path.unlink(), r"{name}: missing, \d+ bytes expected"),
        (lambda path: os.truncate(path, 100), r"{name}: shorter, 100 bytes came, \d+ expected"),
        (lambda path: path.open("ab").write(b"x"), r"{name}: longer, \d+ bytes came, \d+ expected"),
        (flip, r"{name}: other contents, sha256 \w+…, expected \w+…"),
    ],
    ids=["missing", "shorter", "longer", "other"],
)
def test_a_damaged_file_is_named_with_what_came_and_what_else_could_be_used(
    actor, groups, copy, harm, message
):
    name = tensor_file(copy).name
    harm(tensor_file(copy))
    with pytest.raises(CheckpointError, match=message.format(name=name)) as caught:
        load(actor, groups, copy)
    assert "complete by their sizes: step_2" in str(caught.value)
    assert str(copy / "latest") in str(caught.value)
    (copy / "latest").write_text("step_2\n")
    load(actor, groups, copy)
    assert held(actor) == 2


@pytest.mark.parametrize("name", ["rng_0.pt", "common.pt", "state.json", "hf_files/config.json"])
def test_small_files_are_verified_too(actor, groups, copy, name):
    path = copy / "step_4" / name
    data = path.read_bytes()
    path.write_bytes(data.replace(b" ", b"\t", 1) if name.endswith("json") else data[:-1] + b"?")
    with pytest.raises(CheckpointError, match=f"{name}: other contents"):
        load(actor, groups, copy)


def test_a_tensor_file_that_was_not_saved_is_refused(actor, groups, copy):
    shutil.copy(tensor_file(copy), copy / "step_4" / "__7_0.distcp")
    with pytest.raises(CheckpointError, match="__7_0.distcp: not of this checkpoint"):
        load(actor, groups, copy, verify=False)


def test_without_verifying_sizes_are_still_compared(actor, groups, copy):
    flip(copy / "step_4" / "hf_files" / "config.json")
    load(actor, groups, copy, verify=False)
    os.truncate(tensor_file(copy), 100)
    with pytest.raises(CheckpointError, match="shorter, 100 bytes came"):
        load(actor, groups, copy, verify=False)


def test_a_manifest_that_is_gone_is_an_error_where_saving_wrote_one(actor, groups, copy, caplog):
    (copy / "step_4" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"manifest.json: missing; .*step_2"):
        load(actor, groups, copy)
    state = copy / "step_4" / "state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "format": 1}))
    load(actor, groups, copy)
    assert "has no manifest.json: it was saved before checksums were kept" in caplog.text


def test_a_model_from_a_damaged_checkpoint_is_refused(actor, groups, copy):
    flip(tensor_file(copy))
    source = resolve_model(copy)
    assert source.weights == copy / "step_4"
    with pytest.raises(CheckpointError, match="other contents"):
        load_model(actor.chunks, source, actor.hf_config, groups, verify=True)
    load_model(actor.chunks, resolve_model(copy / "step_2"), actor.hf_config, groups, verify=True)
    assert held(actor) == 2


@pytest.mark.parametrize(
    "files_",
    [{"../x": {"bytes": 1, "digest": ""}}, {"/x": {"bytes": 1, "digest": ""}}, {"x": 3}, [1]],
)
def test_a_manifest_of_another_form_is_refused(copy, files_):
    record = {"format": 1, "digest": "sha256", "files": files_}
    (copy / "step_4" / "manifest.json").write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match="no name of a file in its directory|damaged"):
        read_manifest(copy / "step_4")


def test_keeping_the_last_never_counts_a_damaged_one(actor, groups, copy):
    os.truncate(tensor_file(copy), 100)
    fill(actor, 6)
    save(actor, groups, copy, 6, keep_last=2)
    assert sorted(p.name for p in copy.iterdir()) == ["latest", "step_2", "step_6"]


def test_all_is_on_the_disk_before_latest_names_it(actor, groups, tmp_path, monkeypatch):
    """Not a loss of power, but the order: contents, folders, `latest`."""
    done, renamed = [], []
    fsync, replace = os.fsync, os.replace

    def note(handle):
        done.append(Path(os.readlink(f"/proc/self/fd/{handle}")))
        fsync(handle)

    def note_replace(source, target):
        if Path(target).name == "latest":
            renamed.extend(done)
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(os, "replace", note_replace)
    step = save(actor, groups, tmp_path, 1)
    synced = {p.name for p in renamed if p.parent.name == ".step_1.partial"}
    expected = {p.name for p in step.iterdir() if p.is_file()} - {"manifest.json", "state.json"}
    assert expected <= synced
    replaced = {
        f".{name}.{os.getpid()}.partial" for name in ("manifest.json", "state.json", "latest")
    }
    assert replaced <= {p.name for p in renamed}
    assert tmp_path in renamed and tmp_path / ".step_1.partial" in renamed


def test_the_fingerprint_follows_the_weights_and_nothing_else(tiny_model, saved, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "copy")
    source = resolve_model(tmp_path / "copy")
    first = fingerprint(source)
    assert first == fingerprint(resolve_model(tiny_model))
    (tmp_path / "copy" / "README.md").write_text("another word")
    assert fingerprint(source) == first
    weights = tmp_path / "copy" / "model.safetensors"
    flip(weights, at=weights.stat().st_size - 1)
    assert fingerprint(source) != first
    marks = {fingerprint(resolve_model(saved / name)) for name in ("step_2", "step_4")}
    assert len(marks) == 2


def test_a_save_never_replaces_what_latest_names(actor, groups, copy):
    with pytest.raises(CheckpointError, match="step_4 is there already, and latest names it"):
        save(actor, groups, copy, 4)
    (copy / "latest").write_text("step_2\n")
    fill(actor, 5)
    save(actor, groups, copy, 4)
    assert latest_step(copy) == 4
    torch.manual_seed(1)
    load(actor, groups, copy)
    assert held(actor) == 5


def test_generators_and_threads_are_restored_after_code_that_changes_them(actor, groups):
    import random

    import numpy as np

    from megatron_sr1.runtime.rng import preserve_rng_and_threads, rng_state

    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    before = str(rng_state())
    set_num_threads, num_threads = torch.set_num_threads, torch.get_num_threads()
    with preserve_rng_and_threads():
        random.seed(2), np.random.seed(2), torch.manual_seed(2)
        assert str(rng_state()) != before
        torch.set_num_threads(num_threads + 1)
        torch.set_num_threads = None
    assert str(rng_state()) == before
    assert torch.set_num_threads is set_num_threads and torch.get_num_threads() == num_threads
    assert torch.rand(1) == torch.rand(1, generator=torch.Generator().manual_seed(1))
