"""Round trips and resumed runs under layouts of 2 and 4 ranks.

Not covered here: Transformer Engine's layers and optimizer, context parallelism, a run that is
killed while it saves (tests/unit/test_checkpoint_folders.py has its remains).
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.checkpoint_files import files_of, write_two_files

SCRIPT = Path(__file__).parent / "ranks" / "checkpoints.py"
ROOT = Path(__file__).resolve().parents[2]
TIED = ("1x1x1", "2x1x1", "2x1x1s", "2x1x1i", "1x2x1", "1x2x1u", "1x2x1v", "1x1x2")
UNTIED = ("2x1x1b", "1x2x1b")
CONVERT = ROOT / "tools" / "convert_checkpoint.py"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tied model of four layers, enough for two virtual stages on two ranks."""
    from megatron_sr1.demo.digits import corpus_texts
    from megatron_sr1.demo.tiny_model import make_tiny_model

    directory = tmp_path_factory.mktemp("tied")
    make_tiny_model(directory, corpus_texts(), num_layers=4)
    return directory


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    """An untied bfloat16 model in two files, its tensors named as transformers 5 does in memory."""
    from megatron_sr1.demo.digits import corpus_texts
    from megatron_sr1.demo.tiny_model import make_tiny_model

    folder = tmp_path_factory.mktemp("untied")
    make_tiny_model(folder / "one", corpus_texts(), vocab_size=383, tie_word_embeddings=False)
    return write_two_files(folder / "one", folder / "two", in_memory=True)


@pytest.fixture(scope="module")
def written(model, untied, run_ranks, tmp_path_factory):
    out = tmp_path_factory.mktemp("written")
    plans = [f"{model}:{','.join(TIED)}", f"{untied}:{','.join(UNTIED)}"]
    run_ranks(SCRIPT, 2, "roundtrip", out, *plans)
    return out


@pytest.mark.parametrize("layout", TIED)
def test_a_tied_model_comes_back_byte_for_byte(written, model, layout):
    assert files_of(written / model.name / layout) == files_of(model)


@pytest.mark.parametrize("layout", UNTIED)
def test_an_untied_model_in_two_files_comes_back_byte_for_byte(written, untied, layout):
    """Its vocabulary of 383 is padded on two ranks; its names are kept."""
    assert files_of(written / untied.name / layout) == files_of(untied)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["2x2x1", "2x2x1s"])
def test_a_model_on_four_ranks_comes_back_byte_for_byte(model, run_ranks, tmp_path, layout):
    run_ranks(SCRIPT, 4, "roundtrip", tmp_path, f"{model}:{layout}")
    assert files_of(tmp_path / model.name / layout) == files_of(model)


@pytest.fixture(scope="module")
def resumed(model, run_ranks, tmp_path_factory):
    out = tmp_path_factory.mktemp("resumed")
    plans = [
        "1x1x1:1x1x1,2x1x1s,1x2x1,1x1x2",
        "1x2x1:1x2x1",
        "1x1x2:1x1x2,1x1x1,1x2x1",
        "1x1x1w:1x1x1w",
        "1x1x1b:1x1x1b",
    ]
    plans += ["2x1x1i:2x1x1i,1x2x1v", "1x2x1v:1x2x1v,1x2x1u"]
    run_ranks(SCRIPT, 2, "resume", out, model, *plans)
    return out, json.loads((out / "results.json").read_text())


@pytest.mark.parametrize(
    "layout", ["1x1x1", "1x2x1", "1x2x1v", "2x1x1i", "1x1x2", "1x1x1w", "1x1x1b"]
)
def test_a_resumed_run_has_the_numbers_of_one_never_stopped(resumed, layout):
    """Bitwise: losses, gradient norms, learning rates, generators and weights."""
    _, results = resumed
    same = dict(results[f"{layout} to {layout}"])
    assert same.pop("state") == {"cursor": [2, 5]}
    assert same == results[layout]


@pytest.mark.parametrize(
    ("saved", "layout"),
    [
        ("1x1x1", "2x1x1s"),
        ("1x1x1", "1x2x1"),
        ("1x1x1", "1x1x2"),
        ("1x1x2", "1x1x1"),
        ("1x1x2", "1x2x1"),
    ]
    + [("2x1x1i", "1x2x1v"), ("1x2x1v", "1x2x1u")],
)
def test_a_run_resumed_under_another_layout_has_the_same_numbers(resumed, saved, layout):
    _, results = resumed
    one, other = results[saved], results[f"{saved} to {layout}"]
    for before, after in zip(one["updates"], other["updates"], strict=True):
        assert after == pytest.approx(before, rel=2e-6)
    for name, norm in one["norms"].items():
        # A key's bias has no gradient but rounding, which Adam blows up.
        bound = 1e-3 if "k_proj.bias" in name or "qkv.bias" in name else 2e-6
        np.testing.assert_allclose(other["norms"][name], norm, rtol=bound, err_msg=name)


def test_updates_after_the_checkpoint_differ_from_each_other(resumed):
    """Otherwise the equalities above would hold for a model that does not learn."""
    _, results = resumed
    first, second = results["1x1x1"]["updates"]
    assert second["loss"] < first["loss"] - 0.1
    assert first["learning_rate"] < second["learning_rate"]
    assert results["1x1x1"]["draw"][0] != results["1x1x1"]["draw"][1]


def test_only_the_checkpoints_asked_for_are_kept(resumed):
    out, _ = resumed
    assert sorted(p.name for p in (out / "1x1x1").iterdir()) == ["latest", "step_2"]
    assert (out / "1x1x1" / "latest").read_text() == "step_2\n"


def convert(*arguments):
    command = [sys.executable, str(CONVERT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)


def test_the_converter_goes_both_ways_without_a_loss(untied, tmp_path):
    there = convert("hf-to-megatron", untied, tmp_path / "megatron")
    assert there.returncode == 0, there.stderr
    back = convert("megatron-to-hf", tmp_path / "megatron", tmp_path / "hf")
    assert back.returncode == 0, back.stderr
    assert files_of(tmp_path / "hf") == files_of(untied)


def test_a_checkpoint_of_a_run_becomes_a_model(resumed, model, tmp_path):
    """Two updates later it is another model, in the same files."""
    out, _ = resumed
    done = convert("megatron-to-hf", out / "1x2x1", tmp_path / "hf")
    assert done.returncode == 0, done.stderr
    model, trained = files_of(model), files_of(tmp_path / "hf")
    assert model.keys() == trained.keys()
    assert [name for name in model if model[name] != trained[name]] == ["model.safetensors"]
