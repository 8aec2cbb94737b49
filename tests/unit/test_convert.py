"""Conversion tensor by tensor: nothing is lost, held in memory or done twice.

Not covered here: that a converted checkpoint loads under every layout, and that units are where
Megatron puts them (tests/distributed/test_convert_layouts.py); the published sizes end to end
(tools/convert_bench.py).
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_sr1.checkpoint.disk import MANIFEST, read_manifest
from megatron_sr1.checkpoint.folders import resolve_model
from megatron_sr1.checkpoint.saving import write_manifest
from megatron_sr1.conversion.convert import claimed, hf_to_megatron, megatron_to_hf
from megatron_sr1.conversion.plan import peak_bytes, plan_to_hf, plan_to_megatron
from megatron_sr1.errors import CheckpointError
from megatron_sr1.runtime.groups import single_process
from tests.checkpoint_files import files_of
from tests.unit.test_checkpoint_hostile import Attack, put_common, put_metadata, put_tensor
from tools.convert_bench import TOOL, run_watched, write_random_model
from tools.convert_checkpoint import main

PUBLISHED = Path(__file__).resolve().parents[1] / "published"
FILE_BYTES = 2**18  # so that a small model has files enough to be stopped between them


def quiet(what, done_bytes, total_bytes):
    pass


def write_model(tiny_model, folder, tied, dtype):
    """Random weights in several files; 4 query heads on 2 key/value heads, fused vision qkv."""
    config = json.loads((tiny_model / "config.json").read_text())
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = tied
    config["text_config"]["vocab_size"] = 383
    (folder / "config.json").write_text(json.dumps(config))
    write_random_model(folder / "hf", folder / "config.json", FILE_BYTES, dtype)
    (folder / "hf" / "notes.md").write_text("kept")
    return folder / "hf"


@pytest.fixture(scope="module")
def model(tiny_model, tmp_path_factory):
    return write_model(tiny_model, tmp_path_factory.mktemp("model"), True, "BF16")


@pytest.fixture(scope="module")
def converted(model, tmp_path_factory):
    target = tmp_path_factory.mktemp("converted") / "megatron"
    hf_to_megatron(model, target, None, quiet, FILE_BYTES)
    return target


@pytest.mark.parametrize(("tied", "dtype"), [(True, "BF16"), (False, "F32")])
def test_there_and_back_is_byte_for_byte(tiny_model, tmp_path, tied, dtype):
    source = write_model(tiny_model, tmp_path, tied, dtype)
    hf_to_megatron(source, tmp_path / "m", None, quiet, FILE_BYTES)
    assert len(list(source.glob("*.safetensors"))) > 2
    assert len(list((tmp_path / "m" / "step_0").glob("*.distcp"))) > 2
    megatron_to_hf(resolve_model(tmp_path / "m"), tmp_path / "again", True, quiet)
    assert files_of(tmp_path / "again") == files_of(source)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "config.json", "hf", "m"]


def test_the_checkpoint_has_nothing_but_what_a_save_leaves(model, converted):
    assert sorted(p.name for p in converted.iterdir()) == ["latest", "step_0"]
    names = {p.name for p in (converted / "step_0").iterdir() if p.suffix != ".distcp"}
    assert names == {".metadata", "common.pt", "metadata.json", "state.json", "hf_files", MANIFEST}
    named = read_manifest(converted / "step_0").keys() | {MANIFEST}
    assert named == files_of(converted / "step_0").keys()


def test_a_tied_output_layer_that_was_published_comes_back(tiny_model, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "hf")
    tensors = load_file(tiny_model / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    hf_to_megatron(tmp_path / "hf", tmp_path / "megatron", None, quiet)
    megatron_to_hf(resolve_model(tmp_path / "megatron"), tmp_path / "again", True, quiet)
    assert files_of(tmp_path / "again") == files_of(tmp_path / "hf")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_another_type_rounds_once(tiny_model, tmp_path, dtype):
    """Up and back nothing is lost; down and back each value is rounded."""
    model = write_model(tiny_model, tmp_path, True, "BF16" if dtype == "float32" else "F32")
    megatron, again = tmp_path / "m", tmp_path / "again"
    assert main(["hf-to-megatron", str(model), str(megatron), "--dtype", dtype, "--verify"]) == 0
    assert main(["megatron-to-hf", str(megatron), str(again), "--verify"]) == 0
    for path in model.glob("*.safetensors"):
        before, after = load_file(path), load_file(again / path.name)
        for name, tensor in before.items():
            rounded = tensor.to(getattr(torch, dtype)).to(tensor.dtype)
            assert torch.equal(after[name], rounded), name


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from megatron_sr1.checkpoint.folders import resolve_model
from megatron_sr1.conversion.convert import hf_to_megatron, megatron_to_hf

left = int(sys.argv[4])
def report(what, done_bytes, total_bytes):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)

source, target = map(Path, sys.argv[2:4])
if sys.argv[1] == "there":
    hf_to_megatron(source, target, None, report, 2**18)
else:
    megatron_to_hf(resolve_model(source), target, True, report)
"""


def kill_midway(way, source, target):
    """Convert in another process until three quarters of the tensors have been moved."""
    moved = []
    if way == "there":
        hf_to_megatron(source, target.with_name("whole"), None, lambda *a: moved.append(a), 2**18)
    else:
        whole = target.with_name("whole")
        megatron_to_hf(resolve_model(source), whole, True, lambda *a: moved.append(a))
    command = [sys.executable, "-c", KILLED, way, source, target, len(moved) * 3 // 4]
    done = subprocess.run(list(map(str, command)), timeout=240, check=False)
    assert done.returncode == -signal.SIGKILL
    assert not (target / "latest").exists() and not (target / "config.json").exists()
    return files_of(target.with_name("whole"))


def finished_files(folder, pattern):
    return {p.name: p.stat() for p in folder.glob(pattern)}


@pytest.mark.parametrize("harm", ["", "padding", "source"])
def test_a_killed_conversion_keeps_its_finished_files(model, tmp_path, harm):
    """A finished file that was damaged in between is written again, and one of another source.

    The damage is between the values, where only the digest sees it.
    """
    source, target = shutil.copytree(model, tmp_path / "hf"), tmp_path / "m"
    expected = kill_midway("there", source, target)
    noted = sorted(p.name.removesuffix(".json") for p in (target / ".step_0.notes").glob("__*"))
    before = finished_files(target / ".step_0.partial", "*.distcp")
    assert noted and len(noted) < len(list((tmp_path / "whole" / "step_0").glob("*.distcp")))
    if harm == "padding":
        path = target / ".step_0.partial" / noted[0]
        flip(path, path.read_bytes().index(b"ZZZZ"))
    if harm == "source":  # the last byte of the first file: one tensor
        flip(min(source.glob("*.safetensors")), -1)
    told = []
    hf_to_megatron(source, target, None, lambda *a: told.append(a), FILE_BYTES)
    after = finished_files(target / "step_0", "*.distcp")
    kept = [n for n in noted if before[n].st_mtime_ns == after[n].st_mtime_ns]
    assert len(kept) == len(noted) - bool(harm)
    assert bool(kept) == (told[0][0] == "kept")
    if harm == "source":
        hf_to_megatron(source, tmp_path / "new", None, quiet, FILE_BYTES)
        assert expected != files_of(tmp_path / "new")
        expected = files_of(tmp_path / "new")
    assert files_of(target) == expected


@pytest.mark.parametrize("harm", [False, True])
def test_a_killed_export_keeps_its_finished_files(converted, tmp_path, harm):
    expected = kill_midway("back", converted, tmp_path / "hf")
    partial = tmp_path / ".hf.partial"
    before = finished_files(partial, "*.safetensors")
    assert before and len(before) < len(list((tmp_path / "whole").glob("*.safetensors")))
    if harm:
        flip(partial / min(before), -1)
    megatron_to_hf(resolve_model(converted), tmp_path / "hf", True, quiet)
    assert files_of(tmp_path / "hf") == expected
    after = finished_files(tmp_path / "hf", "*.safetensors")
    kept = [n for n in sorted(before) if before[n].st_mtime_ns == after[n].st_mtime_ns]
    assert kept == sorted(before)[harm:]


def test_what_another_model_left_is_not_kept(model, converted, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(model, other)
    for path in other.glob("*.safetensors"):
        flip(path, -1)
    assert main(["hf-to-megatron", str(other), str(tmp_path / "other_m")]) == 0
    partial = tmp_path / ".hf.partial"
    megatron_to_hf(resolve_model(tmp_path / "other_m"), partial, True, quiet)
    megatron_to_hf(resolve_model(converted), tmp_path / "hf", True, quiet)
    assert files_of(tmp_path / "hf") == files_of(model)


def flip(path, place):
    """Change one bit of a file; a place below 0 counts from its end."""
    with path.open("r+b") as file:
        file.seek(place, os.SEEK_SET if place >= 0 else os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def test_verify_finds_one_changed_bit_of_a_checkpoint(model, tmp_path, capsys):
    arguments = ["hf-to-megatron", str(model), str(tmp_path / "m"), "--verify"]
    assert main(arguments) == 0
    assert main(arguments) == 0  # of what is finished, only the comparison
    step = tmp_path / "m" / "step_0"
    path = max(step.glob("*.distcp"), key=lambda p: p.stat().st_size)
    flip(path, path.stat().st_size // 2)
    (step / MANIFEST).unlink()
    write_manifest(step, single_process(), {})  # so that only the values show it
    assert main(arguments) == 1
    said = capsys.readouterr().err
    assert "differ in" in said and path.name in said and said.count("weight (") == 1


def test_verify_finds_one_changed_bit_of_published_weights(model, converted, tmp_path, capsys):
    arguments = ["megatron-to-hf", str(converted), str(tmp_path / "hf"), "--verify"]
    assert main(arguments) == 0
    path = min((tmp_path / "hf").glob("*.safetensors"))
    flip(path, -1)
    assert main(arguments) == 1
    assert f"({path.name}; " in capsys.readouterr().err


def test_a_damaged_checkpoint_gives_no_model(converted, tmp_path):
    shutil.copytree(converted, tmp_path / "m")
    path = min((tmp_path / "m" / "step_0").glob("*.distcp"))
    flip(path, 5000)
    with pytest.raises(CheckpointError, match=f"{path.name}: other contents"):
        megatron_to_hf(resolve_model(tmp_path / "m"), tmp_path / "hf", True, quiet)
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize(
    ("put", "message"),
    [
        (put_metadata, r"\.metadata is refused: it names io\.open"),
        (put_common, r"common\.pt is refused or damaged"),
        (put_tensor, "Weights only load failed"),
    ],
)
def test_a_pickle_that_would_run_code_is_refused(converted, tmp_path, put, message):
    shutil.copytree(converted, tmp_path / "m")
    step = tmp_path / "m" / "step_0"
    put(step, Attack(tmp_path / "owned"))
    (step / MANIFEST).unlink()
    write_manifest(step, single_process(), {})
    with pytest.raises(CheckpointError, match=message):
        megatron_to_hf(resolve_model(tmp_path / "m"), tmp_path / "hf", True, quiet)
    assert not (tmp_path / "owned").exists() and not (tmp_path / "hf").exists()


def test_a_checkpoint_of_another_model_is_refused(converted, tmp_path):
    shutil.copytree(converted, tmp_path / "m")
    path = tmp_path / "m" / "step_0" / ".metadata"
    path.write_bytes(path.read_bytes().replace(b"merger.linear_fc1", b"merger.linear_fc9"))
    (tmp_path / "m" / "step_0" / MANIFEST).unlink()
    write_manifest(tmp_path / "m" / "step_0", single_process(), {})
    with pytest.raises(CheckpointError, match=r"vision_model.merger.linear_fc1.weight is missing"):
        megatron_to_hf(resolve_model(tmp_path / "m"), tmp_path / "hf", True, quiet)


def test_a_target_that_holds_something_is_left_alone(model, converted, tmp_path):
    (tmp_path / "thesis.tex").write_text("do not lose me")
    with pytest.raises(CheckpointError, match="is there already"):
        hf_to_megatron(model, tmp_path, None, quiet)
    with pytest.raises(CheckpointError, match="is there already"):
        megatron_to_hf(resolve_model(converted), tmp_path, True, quiet)
    assert files_of(tmp_path).keys() == {"thesis.tex"}


def test_two_conversions_to_one_target_do_not_mix(model, tmp_path):
    with claimed(tmp_path / "m" / ".step_0.partial"):
        with pytest.raises(CheckpointError, match="another conversion is writing there"):
            hf_to_megatron(model, tmp_path / "m", None, quiet)


@pytest.mark.parametrize(
    ("size", "num_bytes", "largest_bytes"),
    [
        ("3b", 7_509_245_952, 622_329_856),
        ("7b", 16_584_333_312, 1_089_994_752),
        ("32b", 66_905_436_672, 1_557_135_360),
        ("72b", 146_821_554_688, 2_491_416_576),
    ],
)
def test_a_dry_run_reports_sizes_and_memory_from_the_configuration_alone(
    tmp_path, capsys, size, num_bytes, largest_bytes
):
    """Bytes are twice the published count of parameters; the largest is the embedding."""
    shutil.copyfile(PUBLISHED / f"qwen25vl_{size}.json", tmp_path / "config.json")
    assert main(["hf-to-megatron", str(tmp_path), str(tmp_path / "m"), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert f"bytes to write   {num_bytes} " in said
    assert f"largest tensor   {largest_bytes} " in said
    assert peak_bytes(plan_to_megatron(tmp_path, None)) < 2 * largest_bytes + 2**30
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


@pytest.fixture(scope="module")
def scaled(tiny_model, tmp_path_factory):
    """A model of ten times its largest tensor, which is 24 MiB."""
    folder = tmp_path_factory.mktemp("scaled")
    config = json.loads((tiny_model / "config.json").read_text())
    config["text_config"] |= {
        "vocab_size": 24576,
        "hidden_size": 512,
        "intermediate_size": 2816,
        "num_hidden_layers": 24,
        "num_attention_heads": 8,
    }
    config["text_config"]["rope_parameters"]["mrope_section"] = [8, 12, 12]
    config["text_config"].pop("layer_types")
    config["vision_config"]["out_hidden_size"] = 512
    (folder / "config.json").write_text(json.dumps(config))
    write_random_model(folder / "hf", folder / "config.json", 10**8)
    return folder / "hf"


def test_a_conversion_holds_no_more_than_was_predicted(scaled, tmp_path):
    """Of ten times the largest tensor; predicted are Python and torch, and a unit or two."""
    there = plan_to_megatron(scaled, None)
    total = sum(move.target_bytes for move in there)
    assert total >= 10 * max(move.target_bytes for move in there)
    ways = {"hf-to-megatron": (scaled, tmp_path / "m"), "megatron-to-hf": (tmp_path / "m", None)}
    for way, (source, target) in ways.items():
        command = [sys.executable, str(TOOL), way, str(source), str(target or tmp_path / "hf")]
        _, peak = run_watched(command)
        planned = there if target else plan_to_hf(resolve_model(source))
        assert peak_bytes(planned) < 2**28 + 2 * 24 * 2**20
        assert 2**27 < peak <= peak_bytes(planned), way
    assert files_of(tmp_path / "hf") == files_of(scaled)
