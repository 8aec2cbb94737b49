"""Merged weights against PEFT's own `merge_and_unload`."""

import pytest
import torch

from megatron_sr1.checkpoint.folders import ModelSource
from megatron_sr1.checkpoint.hf_files import HFSource
from megatron_sr1.checkpoint.peft_files import PeftAdapter
from megatron_sr1.conversion.adapters import merge
from megatron_sr1.errors import CheckpointError
from tests.peft_adapters import peft_adapter


def merge_from(adapter, base, target):
    reports = []
    merge(
        ModelSource("huggingface", base, base),
        adapter.modules,
        adapter.read,
        adapter.settings.scale,
        target,
        lambda *report: reports.append(report),
    )
    return reports


@pytest.mark.parametrize("rslora", [False, True])
def test_a_merged_model_equals_merge_and_unload_of_peft_bitwise(tiny_model, tmp_path, rslora):
    made = peft_adapter(tiny_model, use_rslora=rslora)
    made.save_pretrained(tmp_path / "adapter")
    reports = merge_from(PeftAdapter(tmp_path / "adapter"), tiny_model, tmp_path / "ours")
    made.merge_and_unload().save_pretrained(tmp_path / "theirs")
    ours, theirs, before = (
        HFSource(d) for d in (tmp_path / "ours", tmp_path / "theirs", tiny_model)
    )
    assert ours.tensors.keys() == theirs.tensors.keys()
    for name in theirs.tensors:
        assert torch.equal(ours.read(name), theirs.read(name)), name
    changed = {n for n in ours.tensors if not torch.equal(ours.read(n), before.read(n))}
    modules = PeftAdapter(tmp_path / "adapter").modules
    assert changed == {f"{module}.weight" for module in modules}
    assert reports[-1][1] == reports[-1][2] == sum(t.num_bytes for t in ours.tensors.values())
    assert (tmp_path / "ours/tokenizer.json").read_bytes() == (
        tiny_model / "tokenizer.json"
    ).read_bytes()


def test_a_base_without_a_module_is_refused(tiny_model, tmp_path):
    peft_adapter(tiny_model).save_pretrained(tmp_path / "adapter")
    adapter = PeftAdapter(tmp_path / "adapter")
    adapter.modules["model.layers.7.mlp.up_proj"] = (1, 1)
    with pytest.raises(CheckpointError, match=r"1 modules .*: model.layers.7.mlp.up_proj"):
        merge_from(adapter, tiny_model, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
