"""Checkpoints written by someone else or damaged: refused in our words, and nothing in them runs.

The manifest of each is made to fit: who writes a hostile file writes its checksum too.
"""

import dataclasses
import io
import json
import os
import pickle
import random
import resource
import shutil
import zipfile

import psutil
import pytest
import torch

from megatron_sr1.checkpoint.disk import MANIFEST
from megatron_sr1.checkpoint.folders import MAX_STATE_BYTES, latest_step, read_state
from megatron_sr1.checkpoint.saving import write_manifest
from megatron_sr1.checkpoint.untrusted import check_folder
from megatron_sr1.errors import CheckpointError
from tests.checkpoint_run import fill, held, load, make_run, save


class Attack:
    """Unpickled by a plain reader, it would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.fixture(scope="module")
def actor(tiny_model, groups):
    return make_run(tiny_model, groups)


@pytest.fixture(scope="module")
def saved(actor, groups, tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    fill(actor, 2)
    save(actor, groups, folder, 2, tiny_model)
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


def sign(step, groups):
    """A manifest that fits what is there now."""
    (step / MANIFEST).unlink()
    write_manifest(step, groups, {})


def put_metadata(step, attack):
    (step / ".metadata").write_bytes(pickle.dumps(attack))


def put_common(step, attack):
    torch.save({"a": attack}, step / "common.pt")


def put_rng(step, attack):
    torch.save({"python": attack}, step / "rng_0.pt")


def put_tensor(step, attack):
    """The embedding's entry leads to a pickle at the end of its file."""
    metadata = check_folder(step)
    for index, info in metadata.storage_data.items():
        if index.fqn.endswith("embedding.word_embeddings.weight"):
            path = step / info.relative_path
            entry, end = io.BytesIO(), path.stat().st_size
            torch.save(attack, entry)
            with path.open("ab") as file:
                file.write(entry.getvalue())
            there = dataclasses.replace(info, offset=end, length=len(entry.getvalue()))
            metadata.storage_data[index] = there
    (step / ".metadata").write_bytes(pickle.dumps(metadata))


@pytest.mark.parametrize(
    ("put", "message"),
    [
        (put_metadata, r"\.metadata is refused: it names io\.open"),
        (put_common, r"common\.pt is refused or damaged"),
        (put_rng, r"rng_0\.pt is refused or damaged"),
        (put_tensor, "step_2: Weights only load failed"),
    ],
    ids=[".metadata", "common.pt", "rng_0.pt", "a tensor"],
)
@pytest.mark.parametrize("verify", [True, False])
def test_a_pickle_that_would_run_code_is_refused_without_running(
    actor, groups, copy, tmp_path, put, message, verify
):
    mark = tmp_path / "owned"
    put(copy / "step_2", Attack(mark))
    sign(copy / "step_2", groups)
    with pytest.raises(CheckpointError, match=message):
        load(actor, groups, copy, verify=verify)
    assert not mark.exists()


def test_the_attacks_above_work_on_a_plain_reader(tmp_path):
    for number, put in enumerate((put_metadata, put_common, put_rng)):
        mark = tmp_path / f"owned_{number}"
        put(tmp_path, Attack(mark))
    pickle.loads((tmp_path / ".metadata").read_bytes())
    torch.load(tmp_path / "common.pt", weights_only=False)
    torch.load(tmp_path / "rng_0.pt", weights_only=False)
    assert len(list(tmp_path.glob("owned_*"))) == 3


@pytest.mark.parametrize(
    "name", ["../x", "/etc", "step_2/../../x", "step_02", "step_²", "step_-1", "x" * 10**6, ""]
)
def test_latest_names_a_folder_beside_it_or_is_refused(copy, name):
    shutil.copytree(copy / "step_2", copy.parent / "x")
    (copy / "latest").write_text(name + "\n")
    with pytest.raises(CheckpointError, match=r"not there or not complete.*\(step_2\)") as caught:
        latest_step(copy)
    assert len(str(caught.value)) < 1000


def link(path):
    path.rename(path.parent.parent / "elsewhere.json")
    path.symlink_to(path.parent.parent / "elsewhere.json")


def pipe(path):
    path.unlink()
    os.mkfifo(path)


def grow(path):
    with path.open("ab") as file:
        file.truncate(MAX_STATE_BYTES + 1)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (link, "a link or no regular file"),
        (pipe, "a link or no regular file"),
        (grow, r"16\.0 MiB, at most 16\.0 MiB expected"),
        (lambda path: path.write_text("[" * 100_000), "not JSON"),
        (lambda path: path.write_bytes(b"\xff\xfe{}"), "not JSON"),
        (lambda path: path.write_text("[]"), "format 'list' came"),
    ],
    ids=["link", "pipe", "huge", "deep", "bytes", "list"],
)
def test_a_state_that_is_no_file_of_ours_is_refused(copy, harm, message):
    harm(copy / "step_2" / "state.json")
    with pytest.raises(CheckpointError, match=message):
        read_state(copy / "step_2")


@pytest.mark.parametrize(
    ("key", "value"),
    [("step", 3), ("step", "2"), ("layout", 1), ("scheduler", {"x": 1}), ("state", [])],
)
def test_a_state_with_other_contents_is_refused(actor, groups, copy, key, value):
    path = copy / "step_2" / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    sign(copy / "step_2", groups)
    with pytest.raises(CheckpointError, match="state.json"):
        load(actor, groups, copy)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"Nr\xff\xff\xff\x7f.", "it numbers an object 2147483647"),
        (b"Np2147483647\n.", "it numbers an object 2147483647"),
        (b"\x80\x05\x96" + (2**40).to_bytes(8, "little") + b".", "damaged"),
        (b"\x80\x04\x8e" + (2**40).to_bytes(8, "little") + b".", "damaged"),
        (b"\x80\x04\x95" + (2**40).to_bytes(8, "little") + b".", "damaged"),
    ],
    ids=["number", "number in text", "bytearray", "bytes", "frame"],
)
def test_metadata_of_a_few_bytes_cannot_ask_for_all_memory(tmp_path, little_memory, data, message):
    (tmp_path / ".metadata").write_bytes(data)
    with pytest.raises(CheckpointError, match=message):
        check_folder(tmp_path)


@pytest.mark.parametrize("name", ["common.pt", "rng_0.pt"])
def test_a_pickle_that_ends_within_a_number_is_refused(actor, groups, copy, name):
    """torch's reader of plain values lets the error of `struct` through."""
    with zipfile.ZipFile(copy / "step_2" / name, "w") as file:
        for part, data in {"data.pkl": b"\x80\x02J", "version": b"3\n"}.items():
            file.writestr(f"archive/{part}", data)
    sign(copy / "step_2", groups)
    with pytest.raises(CheckpointError, match=f"{name} is refused or damaged"):
        load(actor, groups, copy)


@pytest.fixture
def little_memory():
    """A reader that takes too much fails here instead of ending the machine's other work."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    now = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (now + 2**31, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def test_metadata_with_any_byte_changed_is_read_or_refused_in_our_words(
    saved, tmp_path, little_memory
):
    """No error but ours leaves the reader, whatever is in the file."""
    rng, whole = random.Random(5), (saved / "step_2" / ".metadata").read_bytes()
    shutil.copy(saved / "step_2" / "common.pt", tmp_path)
    refused = 0
    for _ in range(400):
        data = bytearray(whole[: rng.choice([len(whole), rng.randrange(len(whole))])])
        for _ in range(rng.randrange(1, 4)):
            if data:
                data[rng.randrange(min(len(data), 4000))] = rng.randrange(256)
        (tmp_path / ".metadata").write_bytes(data)
        try:
            check_folder(tmp_path)
        except CheckpointError:
            refused += 1
    assert refused > 100


def test_what_was_refused_changes_nothing_for_the_next(actor, groups, copy, tmp_path):
    put_rng(copy / "step_2", Attack(tmp_path / "owned"))
    with pytest.raises(CheckpointError, match="rng_0.pt: "):
        load(actor, groups, copy)
    shutil.rmtree(copy)
    fill(actor, 7)
    save(actor, groups, copy, 7)
    fill(actor, 9)
    assert load(actor, groups, copy) == {"n": 7} and held(actor) == 7
