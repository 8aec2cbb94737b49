"""Adapters in PEFT's format that are refused, with a message that names the cause."""

import json

import pytest
import torch
from safetensors.torch import save_file

from megatron_sr1.checkpoint.peft_files import PeftAdapter, write_adapter
from megatron_sr1.config.adapter import AdapterConfig
from megatron_sr1.errors import CheckpointError, ConfigError

MODULE = "model.layers.0.self_attn.q_proj"
STORED = "base_model.model.model.language_model.layers.0.self_attn.q_proj"


def adapter(directory, settings=(), tensors=None, **more):
    """An adapter of rank 2 with other settings or tensors."""
    directory.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 16, "target_modules": ["q_proj"]}
    text = json.dumps({**config, **dict(settings), **more})
    (directory / "adapter_config.json").write_text(text)
    if tensors is None:
        tensors = {
            f"{STORED}.lora_A.weight": torch.ones(2, 4),
            f"{STORED}.lora_B.weight": torch.ones(6, 2),
        }
    save_file(tensors, directory / "adapter_model.safetensors")
    return directory


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"peft_type": "LOHA"}, "LOHA"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 4}}, "alpha_pattern"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias=all"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({"lora_bias": True}, "lora_bias"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
        ({"a_feature_of_next_year": {"on": 1}}, "a_feature_of_next_year"),
        ({"r": 0}, "r is '0'"),
        ({"r": True}, "r is 'True'"),
        ({"lora_alpha": "nan"}, "lora_alpha"),
        ({"lora_dropout": 1.0}, "lora_dropout"),
    ],
)
def test_settings_that_are_not_supported_are_named(tmp_path, settings, named):
    with pytest.raises(CheckpointError, match=named):
        PeftAdapter(adapter(tmp_path / "a", settings))


def test_defaults_of_an_installed_peft_are_accepted(tmp_path):
    from peft import LoraConfig

    LoraConfig(r=2, lora_alpha=16, target_modules=["q_proj"]).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    found = PeftAdapter(adapter(tmp_path / "a", saved))
    assert found.settings == AdapterConfig(rank=2, alpha=16.0)
    assert found.modules == {MODULE: (4, 6)}


@pytest.mark.parametrize(
    ("tensors", "named"),
    [
        ({f"{STORED}.lora_A.weight": torch.ones(2, 4)}, r"B \[\]"),
        (
            {
                f"{STORED}.lora_A.weight": torch.ones(3, 4),
                f"{STORED}.lora_B.weight": torch.ones(6, 3),
            },
            "r=2",
        ),
        ({f"{STORED}.lora_magnitude_vector": torch.ones(6)}, "lora_magnitude_vector"),
        ({"base_model.model.lm_head.base_layer.weight": torch.ones(6, 4)}, "lm_head.base_layer"),
        ({"model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 4)}, "none of LoRA"),
        ({f"{STORED}.lora_A.weight": torch.ones(2, 4, dtype=torch.int32)}, "I32"),
        ({}, "no tensors"),
    ],
)
def test_tensors_that_are_no_pair_of_matrices_are_named(tmp_path, tensors, named):
    with pytest.raises(CheckpointError, match=named):
        PeftAdapter(adapter(tmp_path / "a", tensors=tensors))


def test_damaged_and_missing_files_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="directory of an adapter"):
        PeftAdapter(tmp_path)
    cut = adapter(tmp_path / "cut") / "adapter_model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="cut off"):
        PeftAdapter(cut.parent)
    cut.rename(cut.with_suffix(".bin"))
    with pytest.raises(CheckpointError, match="save it as safetensors"):
        PeftAdapter(cut.parent)
    (cut.parent / "adapter_config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="list came"):
        PeftAdapter(cut.parent)


def test_a_run_must_agree_with_the_adapter_that_it_starts_from(tmp_path):
    found = PeftAdapter(adapter(tmp_path / "a", lora_alpha=5, use_rslora=True))
    agreed = AdapterConfig(rank=2, alpha=5.0, scaling="rslora")
    found.check(agreed, [MODULE])
    wanted = "set adapter.rank=2 adapter.alpha=5 adapter.scaling=rslora"
    with pytest.raises(ConfigError, match=wanted):
        found.check(AdapterConfig(rank=8, alpha=5.0, scaling="rslora"), [MODULE])
    with pytest.raises(ConfigError, match=r"1 modules that it lacks: model.layers.1.x"):
        found.check(agreed, [MODULE, "model.layers.1.x"])
    with pytest.raises(ConfigError, match=f"1 modules not among the targets: {MODULE}"):
        found.check(agreed, [])


def test_only_an_adapter_is_replaced(tmp_path):
    found = PeftAdapter(adapter(tmp_path / "a"))
    parts = {"lora_A.weight": torch.zeros(2, 4), "lora_B.weight": torch.zeros(6, 2)}
    write_adapter(tmp_path / "a", found.settings, [(f"{MODULE}.{n}", t) for n, t in parts.items()])
    assert not PeftAdapter(tmp_path / "a").read(f"{MODULE}.lora_B.weight").any()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="holds no adapter"):
        write_adapter(tmp_path / "other", found.settings, [])
    assert (tmp_path / "other" / "notes.txt").read_text() == "mine"
