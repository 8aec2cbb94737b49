"""`tie_word_embeddings` stands in two places of a config.json, and a tied `lm_head.weight` may be
in the files all the same. Where it is not the embedding, nothing may be loaded: it would be lost.

Sources: NVIDIA-NeMo/Automodel#2268, sgl-project/sglang#18024, huggingface/transformers#45857.
"""

import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_sr1.checkpoint.folders import resolve_model
from megatron_sr1.checkpoint.hf import save_hf
from megatron_sr1.config.loading import load_config
from megatron_sr1.config.run import ModelConfig
from megatron_sr1.errors import CheckpointError
from megatron_sr1.model.hf_config import read_hf_config
from megatron_sr1.runtime.device import select_device
from megatron_sr1.trainer.actor import load_actor_model
from megatron_sr1.trainer.sync import engine_directory
from tests.checkpoint_files import files_of
from tools.convert_checkpoint import main as convert
from tools.scoring_backends import huggingface_directory, loaded

pytestmark = pytest.mark.field
DIFFER = "lm_head.weight differs from model.embed_tokens.weight"
FLAGS = [(True, True), (False, True), (True, False), (None, True), (True, None)]
WEIGHTS, HEAD, EMBEDDING = "model.safetensors", "lm_head.weight", "model.embed_tokens.weight"


def set_flags(directory, outer, inner):
    """Write the outer and the nested flag; None leaves one out."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    for place, flag in ((config, outer), (config["text_config"], inner)):
        place.pop("tie_word_embeddings", None)
        if flag is not None:
            place["tie_word_embeddings"] = flag
    path.write_text(json.dumps(config))


def make_model(tiny_model, directory, outer, inner, change=None, dtype=torch.float32):
    """The tiny model with both flags and an output layer, the embedding's copy or a changed one."""
    shutil.copytree(tiny_model, directory)
    set_flags(directory, outer, inner)
    tensors = load_file(tiny_model / WEIGHTS)
    head = tensors[EMBEDDING].to(dtype).clone()
    tensors[HEAD] = head if change is None else change(head)
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    return directory


def last_row(head):
    """A change of one number of the last row: what is compared in blocks is compared to the end."""
    head[-1, -1] += 0.5
    return head


def settings(model, tmp_path):
    given = [f"model.path={model}", f"output={tmp_path / 'run'}", "model.dtype=float32"]
    return load_config(None, given)


@pytest.mark.parametrize(("outer", "inner"), FLAGS)
def test_an_output_layer_that_differs_is_refused_wherever_it_would_be_lost(
    tiny_model, tmp_path, groups, capsys, outer, inner
):
    model = make_model(tiny_model, tmp_path / "hf", outer, inner, last_row)
    config = settings(model, tmp_path)
    with pytest.raises(CheckpointError, match=DIFFER) as caught:  # sft and grpo
        load_actor_model(config, groups)
    for name, flag in (("", outer), ("text_config.", inner)):
        said = f"{name}tie_word_embeddings={str(flag).lower()}"
        assert (said in str(caught.value)) == (flag is not None)
    assert "by up to 0.5" in str(caught.value)
    with pytest.raises(CheckpointError, match=DIFFER):  # eval and grpo's engine
        engine_directory(config, groups)
    with (
        pytest.raises(CheckpointError, match=DIFFER),
        huggingface_directory(resolve_model(model), select_device("cpu")),
    ):
        pass
    for more in ([], ["--verify"], ["--dry-run"]):
        assert convert(["hf-to-megatron", str(model), str(tmp_path / "m"), *more]) == 1
        assert DIFFER in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf"]


def test_a_checkpoint_that_an_older_version_made_of_it_is_not_verified(
    tiny_model, tmp_path, capsys
):
    model = make_model(tiny_model, tmp_path / "hf", False, True)
    target = str(tmp_path / "m")
    assert convert(["hf-to-megatron", str(model), target]) == 0
    tensors = load_file(model / WEIGHTS)
    tensors[HEAD] += 1
    save_file(tensors, model / WEIGHTS, metadata={"format": "pt"})
    assert convert(["hf-to-megatron", str(model), target, "--verify"]) == 1
    assert DIFFER in capsys.readouterr().err


@pytest.mark.parametrize(("outer", "inner"), FLAGS)
def test_an_equal_output_layer_comes_back_byte_for_byte_under_any_flags(
    tiny_model, tmp_path, groups, outer, inner
):
    model = make_model(tiny_model, tmp_path / "hf", outer, inner)
    chunks, hf_config, source = load_actor_model(settings(model, tmp_path), groups)
    assert hf_config.tie_word_embeddings
    save_hf(chunks, hf_config, groups, source.hf_files, tmp_path / "export")
    assert files_of(tmp_path / "export") == files_of(model)


def test_both_ways_of_the_conversion_keep_an_equal_output_layer(
    tiny_model, tmp_path, groups, caplog
):
    model = make_model(tiny_model, tmp_path / "hf", False, True)
    for way, source, target in (("hf-to-megatron", model, "m"), ("megatron-to-hf", "m", "again")):
        arguments = [way, str(tmp_path / source), str(tmp_path / target), "--verify"]
        with caplog.at_level(logging.WARNING):
            assert convert(arguments) == 0
    assert files_of(tmp_path / "again") == files_of(model)
    said = "tie_word_embeddings=false and text_config.tie_word_embeddings=true"
    assert said in caplog.text  # of a checkpoint, whose published values are not at hand


def test_an_output_layer_in_another_type_is_equal_if_it_is_the_rounded_embedding(
    tiny_model, tmp_path, groups
):
    model = make_model(tiny_model, tmp_path / "hf", True, True, dtype=torch.bfloat16)
    load_actor_model(settings(model, tmp_path), groups)
    other = make_model(tiny_model, tmp_path / "b", True, True, last_row, dtype=torch.bfloat16)
    with pytest.raises(CheckpointError, match=DIFFER):
        load_actor_model(settings(other, tmp_path), groups)


def test_an_output_layer_of_another_shape_is_named(tiny_model, tmp_path, groups):
    model = make_model(tiny_model, tmp_path / "hf", True, True, lambda head: head[:-1].clone())
    with pytest.raises(CheckpointError, match=r"misshapen: lm_head.weight"):
        load_actor_model(settings(model, tmp_path), groups)


@pytest.mark.parametrize("change", [None, last_row])
def test_an_untied_model_keeps_an_output_layer_of_its_own_equal_or_not(
    tiny_model, tmp_path, groups, change
):
    model = make_model(tiny_model, tmp_path / "hf", False, False, change)
    chunks, hf_config, source = load_actor_model(settings(model, tmp_path), groups)
    save_hf(chunks, hf_config, groups, source.hf_files, tmp_path / "export")
    assert files_of(tmp_path / "export") == files_of(model)


def test_without_an_output_layer_any_flag_ties(tiny_model, tmp_path):
    for number, (outer, inner) in enumerate([*FLAGS, (False, False), (None, None)]):
        directory = tmp_path / str(number)
        shutil.copytree(tiny_model, directory)
        set_flags(directory, outer, inner)
        assert read_hf_config(directory).tie_word_embeddings == bool(outer or inner)


def test_a_checkpoint_with_an_output_layer_is_not_read_as_a_tied_model(
    tiny_model, tmp_path, groups, capsys
):
    model = make_model(tiny_model, tmp_path / "hf", False, False, last_row)
    assert convert(["hf-to-megatron", str(model), str(tmp_path / "m")]) == 0
    (tmp_path / "m" / "step_0" / "manifest.json").unlink()
    state = tmp_path / "m" / "step_0" / "state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "format": 1}))
    set_flags(tmp_path / "m" / "step_0" / "hf_files", True, False)
    with pytest.raises(CheckpointError, match="an output layer of its own"):
        load_actor_model(settings(tmp_path / "m", tmp_path), groups)
    arguments = ["megatron-to-hf", str(tmp_path / "m"), str(tmp_path / "again"), "--verify"]
    assert convert(arguments) == 1
    assert "an output layer of its own" in capsys.readouterr().err


def test_score_logprobs_refuses_it_before_it_scores(tiny_model, tmp_path, groups):
    model = make_model(tiny_model, tmp_path / "hf", True, False, last_row)
    with pytest.raises(CheckpointError, match=DIFFER):
        loaded(resolve_model(model), groups, ModelConfig(dtype="float32"))
