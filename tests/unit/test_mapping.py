"""The table between Megatron's parameters and published tensors, without a model.

Not covered here: that the parameters compute what they should (tests/parity does that).
"""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_sr1.checkpoint.hf import check_tensors
from megatron_sr1.checkpoint.hf_files import HFSource, check_target, write_like
from megatron_sr1.checkpoint.mapping import canonical_hf_name, canonical_parameter, entries
from megatron_sr1.checkpoint.transforms import join, publish, slices
from megatron_sr1.errors import CheckpointError, ConfigError
from megatron_sr1.model.hf_config import read_hf_config
from tests.checkpoint_files import files_of, write_two_files


def local_rows(entry, size):
    return -(-entry.hf_shapes[0][0] // size)


def shard(entry, tensors, rank, size):
    wanted = slices(entry, rank, size, local_rows(entry, size))
    value = join(entry, [tensors[name][block] for name, block in wanted], size)
    if entry.form == "vocabulary":
        missing = local_rows(entry, size) - len(value)
        value = torch.cat([value, value.new_zeros(missing, value.shape[1])])
    return value


@pytest.fixture(scope="module")
def published(tiny_model):
    return load_file(tiny_model / "model.safetensors")


@pytest.mark.parametrize("size", [1, 2])
def test_shards_are_joined_into_the_published_tensors(tiny_model, published, size):
    seen = {}
    for entry in entries(read_hf_config(tiny_model)):
        seen.update(publish(entry, [shard(entry, published, r, size) for r in range(size)]))
    assert seen.keys() == published.keys()
    for name, tensor in seen.items():
        assert tensor.dtype == published[name].dtype
        assert torch.equal(tensor, published[name]), name


def entry_of(config, name):
    return next(e for e in entries(config) if e.name.endswith(name))


def test_qkv_rows_are_grouped_by_key_value_head(tiny_model):
    """By hand: 4 query heads, 2 key/value heads of 32 channels: q0 q1 k0 v0 | q2 q3 k1 v1."""
    entry = entry_of(read_hf_config(tiny_model), "language_model.decoder.layers.1."
                     "self_attention.linear_qkv.bias")  # fmt: skip
    q, k, v = 100 + torch.arange(4), 200 + torch.arange(2), 300 + torch.arange(2)
    parts = [heads.repeat_interleave(32) for heads in (q, k, v)]
    whole = join(entry, parts)
    assert whole[::32].tolist() == [100, 101, 200, 300, 102, 103, 201, 301]
    wanted = slices(entry, 1, 2, 0)
    tensors = dict(zip(entry.hf_names, parts, strict=True))
    assert join(entry, [tensors[name][block] for name, block in wanted], 2)[::32].tolist() == [
        102, 103, 201, 301,
    ]  # fmt: skip


def test_fused_vision_qkv_is_cut_into_three_before_it_is_split(tiny_model):
    entry = entry_of(read_hf_config(tiny_model), "layers.0.self_attention.linear_qkv.weight")
    assert entry.name.startswith("vision_model")
    name = "visual.blocks.0.attn.qkv.weight"
    assert slices(entry, 1, 2, 192) == [
        (name, (slice(first, first + 64),)) for first in (64, 192, 320)
    ]


def test_gate_comes_before_up_on_every_rank(tiny_model):
    entry = entry_of(read_hf_config(tiny_model), "layers.0.mlp.linear_fc1.bias")
    gate, up = torch.arange(256), 1000 + torch.arange(256)
    tensors = dict(zip(entry.hf_names, (gate, up), strict=True))
    second = shard(entry, tensors, 1, 2)
    assert second.tolist() == [*range(128, 256), *range(1128, 1256)]


@pytest.mark.parametrize("size", [3, 5])
def test_a_padded_vocabulary_keeps_its_rows(tiny_model, size):
    entry = entry_of(read_hf_config(tiny_model), "word_embeddings.weight")
    entry = replace(entry, hf_shapes=((383, 128),))
    table = torch.randn(383, 128)
    shards = [shard(entry, {entry.hf_names[0]: table}, r, size) for r in range(size)]
    assert len({len(s) for s in shards}) == 1
    ((_, whole),) = publish(entry, shards)
    assert torch.equal(whole, table)


def test_key_value_heads_that_do_not_divide_are_refused(tiny_model):
    entry = entry_of(read_hf_config(tiny_model), "layers.1.self_attention.linear_qkv.bias")
    with pytest.raises(ConfigError, match=r"4 key/value heads do not divide"):
        slices(entry, 0, 3, 0)


def test_only_an_untied_model_has_an_output_layer_of_its_own(tiny_model):
    config = read_hf_config(tiny_model)
    tied = {n for e in entries(config) for n in e.hf_names}
    without_flags = replace(config, raw={})
    untied = {n for e in entries(without_flags) for n in e.hf_names}
    assert untied - tied == {"lm_head.weight"}


@pytest.mark.parametrize(
    ("name", "first", "expected"),
    [
        (
            "module.language_model.decoder.layers.1.mlp.linear_fc1.layer_norm_weight",
            4,
            "language_model.decoder.layers.5.pre_mlp_layernorm.weight",
        ),
        (
            "vision_model.decoder.layers.1.self_attention.linear_qkv.layer_norm_weight",
            4,
            "vision_model.decoder.layers.1.input_layernorm.weight",
        ),
        ("language_model.decoder.layers.0.mlp.linear_fc1.weight", 0, None),
    ],
)
def test_both_spellings_and_all_pipeline_stages_have_one_canonical_name(name, first, expected):
    assert canonical_parameter(name, first) == (expected or name)


def test_names_of_transformers_in_memory_are_mapped_to_published_ones():
    assert canonical_hf_name("model.language_model.layers.0.x") == "model.layers.0.x"
    assert canonical_hf_name("model.visual.patch_embed.proj.weight").startswith("visual.patch")
    assert canonical_hf_name("model.layers.0.x") == "model.layers.0.x"
    assert canonical_hf_name("lm_head.weight") == "lm_head.weight"


def stream(source):
    for name in source.tensors:
        yield name, source.read(name).float()


@pytest.mark.parametrize("in_memory", [False, True])
def test_a_directory_is_a_copy_of_its_source_byte_for_byte(tiny_model, tmp_path, in_memory):
    directory = write_two_files(tiny_model, tmp_path / "source", in_memory)
    (directory / "notes").mkdir()
    (directory / "notes" / "readme.md").write_text("hello")
    (directory / ".gitattributes").write_text("*.safetensors filter=lfs\r\n")
    (directory / "merges.txt").write_bytes(bytes(range(256)))
    source = HFSource(directory)
    check_tensors(source, read_hf_config(directory))
    write_like(source, tmp_path / "copy", stream(source))
    assert files_of(tmp_path / "copy") == files_of(directory)


def test_headers_alone_are_enough_to_write(tiny_model, tmp_path):
    directory = write_two_files(tiny_model, tmp_path / "source")
    full = HFSource(directory)
    full.copy_without_weights(tmp_path / "headers")
    headers = HFSource(tmp_path / "headers")
    assert full.has_weights and not headers.has_weights
    write_like(headers, tmp_path / "copy", stream(full))
    assert files_of(tmp_path / "copy") == files_of(directory)


def test_a_missing_tensor_leaves_no_directory(tiny_model, tmp_path):
    source = HFSource(tiny_model)
    weights = [pair for pair in stream(source) if pair[0] != "model.norm.weight"]
    with pytest.raises(CheckpointError, match="no values came for model.norm.weight"):
        write_like(source, tmp_path / "copy", iter(weights))
    assert not (tmp_path / "copy").exists()


def test_all_missing_unexpected_and_misshapen_tensors_are_named(tiny_model, tmp_path):
    tensors = load_file(tiny_model / "model.safetensors")
    shutil.copy(tiny_model / "config.json", tmp_path)
    del tensors["visual.merger.ln_q.weight"]
    tensors["model.layers.9.norm.weight"] = torch.zeros(1)
    tensors["model.norm.weight"] = torch.zeros(7)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        check_tensors(HFSource(tmp_path), read_hf_config(tmp_path))
    message = str(caught.value)
    assert "1 missing: visual.merger.ln_q.weight [128]" in message
    assert "1 unexpected: model.layers.9.norm.weight (in model.safetensors)" in message
    assert "model.norm.weight (in model.safetensors): [7], expected [128]" in message


def test_a_truncated_file_is_refused_by_name(tiny_model, tmp_path):
    whole = (tiny_model / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(CheckpointError, match=r"model.safetensors: cut off"):
        HFSource(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(CheckpointError, match=r"not a safetensors file"):
        HFSource(tmp_path)


def test_an_index_may_not_point_outside_its_directory(tmp_path):
    index = {"weight_map": {"a": "../secret.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="is not the name of a file next to it"):
        HFSource(tmp_path)


def test_a_directory_without_weights_is_refused_with_the_names_expected(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="looked for model.safetensors.index.json"):
        HFSource(tmp_path)


def test_a_target_with_other_files_is_left_alone(tiny_model, tmp_path):
    source = HFSource(tiny_model)
    (tmp_path / "thesis.tex").write_text("do not lose me")
    with pytest.raises(CheckpointError, match="holds no model"):
        check_target(source, tmp_path)
    with pytest.raises(CheckpointError, match="lies inside the source"):
        check_target(source, tiny_model / "copy")
