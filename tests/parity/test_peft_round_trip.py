"""Adapters in PEFT's format against PEFT itself, which reads and writes the other side."""

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_sr1.checkpoint.peft_files import PeftAdapter, write_adapter
from tests.peft_adapters import EVERYWHERE, LANGUAGE, base_model, peft_adapter

WEIGHTS = "adapter_model.safetensors"
IDS = torch.arange(30, 60)[None]


def stored(directory):
    return load_file(directory / WEIGHTS)


def equal(ours, theirs):
    same_types = all(ours[name].dtype == tensor.dtype for name, tensor in theirs.items())
    return ours.keys() == theirs.keys() and same_types and all(
        torch.equal(ours[name], tensor) for name, tensor in theirs.items()
    )  # fmt: skip


@pytest.mark.parametrize(
    ("targets", "scaling", "dtype"),
    [(EVERYWHERE, "standard", torch.float32), (LANGUAGE, "rslora", torch.bfloat16)],
)
def test_a_round_trip_from_peft_and_back_is_bitwise(tiny_model, tmp_path, targets, scaling, dtype):
    rslora = scaling == "rslora"
    made = peft_adapter(
        tiny_model, target_modules=targets, use_rslora=rslora, lora_dropout=0.25, dtype=dtype
    )
    made.save_pretrained(tmp_path / "peft")
    ours = PeftAdapter(tmp_path / "peft")
    assert (ours.settings.rank, ours.settings.alpha, ours.settings.dropout) == (4, 6.0, 0.25)
    assert ours.settings.scaling == scaling
    layer = made.base_model.model.model.language_model.layers[0].self_attn.q_proj
    assert ours.settings.scale == layer.scaling["default"]
    write_adapter(tmp_path / "ours", ours.settings, ours.tensors(), str(tiny_model))
    assert equal(stored(tmp_path / "ours"), stored(tmp_path / "peft"))


@pytest.mark.parametrize("rslora", [False, True])
def test_peft_loads_what_is_written_here_and_computes_the_same(tiny_model, tmp_path, rslora):
    made = peft_adapter(tiny_model, use_rslora=rslora, lora_dropout=0.25)
    made.save_pretrained(tmp_path / "peft")
    ours = PeftAdapter(tmp_path / "peft")
    write_adapter(tmp_path / "ours", ours.settings, ours.tensors(), str(tiny_model))
    again = peft.PeftModel.from_pretrained(base_model(tiny_model), tmp_path / "ours")
    with torch.no_grad():
        assert torch.equal(again(input_ids=IDS).logits, made(input_ids=IDS).logits)
        with again.disable_adapter():
            assert not torch.equal(again(input_ids=IDS).logits, made(input_ids=IDS).logits)
    again.save_pretrained(tmp_path / "again")
    assert equal(stored(tmp_path / "again"), stored(tmp_path / "peft"))
    config = again.peft_config["default"]
    assert (config.r, config.lora_alpha, config.use_rslora, config.lora_dropout) == (
        *(4, 6, rslora, 0.25),
    )


def test_peft_puts_adapters_on_exactly_the_modules_of_the_file(tiny_model, tmp_path):
    peft_adapter(tiny_model).save_pretrained(tmp_path / "peft")
    ours = PeftAdapter(tmp_path / "peft")
    one = "model.layers.1.mlp.gate_proj"  # the tower has modules of that name too
    tensors = [(name, tensor) for name, tensor in ours.tensors() if name.startswith(one)]
    write_adapter(tmp_path / "one", ours.settings, tensors)
    loaded = peft.PeftModel.from_pretrained(base_model(tiny_model), tmp_path / "one")
    found = {name for name, _ in loaded.named_modules() if name.endswith(".lora_A")}
    assert found == {"base_model.model.model.language_model.layers.1.mlp.gate_proj.lora_A"}


def test_names_of_older_transformers_are_read(tiny_model, tmp_path):
    peft_adapter(tiny_model).save_pretrained(tmp_path / "new")
    old = tmp_path / "old"
    old.mkdir()
    (old / "adapter_config.json").write_bytes((tmp_path / "new/adapter_config.json").read_bytes())
    renamed = {
        name.replace("model.language_model.", "model.").replace("model.visual.", "visual."): tensor
        for name, tensor in stored(tmp_path / "new").items()
    }
    assert "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight" in renamed
    assert "base_model.model.visual.merger.mlp.0.lora_B.weight" in renamed
    save_file(renamed, old / WEIGHTS)
    assert equal(dict(PeftAdapter(old).tensors()), dict(PeftAdapter(tmp_path / "new").tensors()))
