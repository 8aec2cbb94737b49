"""tools/convert_checkpoint.py --adapter on a checkpoint of adapters, in one process.

Checkpoints of several ranks: tests/distributed/test_adapter_exports.py.
"""

import json
import shutil

import pytest
import torch

from megatron_sr1.checkpoint.disk import MANIFEST
from megatron_sr1.checkpoint.folders import ADAPTER, FINGERPRINT, fingerprint, resolve_model
from megatron_sr1.checkpoint.hf_files import HFSource
from megatron_sr1.checkpoint.peft_files import PeftAdapter
from megatron_sr1.checkpoint.saving import SaveQueue
from megatron_sr1.config.training import CheckpointConfig
from tests.checkpoint_run import make_run
from tests.peft_adapters import EVERYWHERE, peft_adapter
from tools.convert_checkpoint import main

TARGETS = [r"_proj$", r"visual[.]blocks.*(qkv|proj)$", r"merger[.]mlp"]


@pytest.fixture(scope="module")
def saved(tiny_model, groups, tmp_path_factory):
    """A checkpoint of PEFT's adapter on all linear layers, that adapter, and the merged model."""
    folder = tmp_path_factory.mktemp("saved")
    made = peft_adapter(tiny_model, target_modules=EVERYWHERE)
    made.save_pretrained(folder / "peft")
    keys = [f"adapter.path={folder / 'peft'}", "adapter.rank=4", "adapter.alpha=6"]
    actor = make_run(tiny_model, groups, keys=[*keys, f"adapter.targets={json.dumps(TARGETS)}"])
    facts = {"rank": 4, "alpha": 6.0, "scaling": "standard", "targets": TARGETS}
    state = {
        "model.path": str(tiny_model),
        FINGERPRINT: fingerprint(resolve_model(tiny_model)),
        ADAPTER: facts,
    }
    queue = SaveQueue(folder / "checkpoints", CheckpointConfig())
    queue.add(1, actor.trained, state, tiny_model)
    actor.save_hf(folder / "hf")
    return folder


def convert(source, target, *more):
    return main(["megatron-to-hf", str(source), str(target), *more])


def test_an_export_is_the_adapter_bitwise(saved, tmp_path):
    assert convert(saved / "checkpoints", tmp_path / "out", "--adapter", "export") == 0
    ours, theirs = PeftAdapter(tmp_path / "out"), PeftAdapter(saved / "peft")
    assert ours.settings == theirs.settings and ours.modules == theirs.modules
    for name, tensor in theirs.tensors():
        assert torch.equal(ours.read(name), tensor), name


def test_a_merged_model_is_that_of_the_run_bitwise(saved, tiny_model, tmp_path):
    assert convert(saved / "checkpoints/step_1", tmp_path / "out", "--adapter", "merge") == 0
    assert files(tmp_path / "out") == files(saved / "hf")
    before, after = HFSource(tiny_model), HFSource(tmp_path / "out")
    changed = {n for n in after.tensors if not torch.equal(before.read(n), after.read(n))}
    assert changed == {f"{module}.weight" for module in PeftAdapter(saved / "peft").modules}


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_megatron_base_is_merged_too(saved, tiny_model, tmp_path, capsys):
    assert main(["hf-to-megatron", str(tiny_model), str(tmp_path / "base")]) == 0
    base = ["--adapter", "merge", "--base", str(tmp_path / "base")]
    assert convert(saved / "checkpoints", tmp_path / "no", *base) == 1
    assert "fingerprints differ" in capsys.readouterr().err  # another form of the same model
    copy = tmp_path / "copy" / "step_1"
    shutil.copytree(saved / "checkpoints" / "step_1", copy)
    change(copy, FINGERPRINT, fingerprint(resolve_model(tmp_path / "base")))
    assert convert(copy, tmp_path / "out", *base) == 0
    assert files(tmp_path / "out") == files(saved / "hf")


def change(folder, key, value):
    """Set a value of the state; the manifest knows the old one."""
    record = json.loads((folder / "state.json").read_text())
    record["state"][key] = value
    (folder / "state.json").write_text(json.dumps(record))
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["files"]["state.json"]
    (folder / MANIFEST).write_text(json.dumps(manifest))


def test_what_cannot_be_converted_is_named(saved, tiny_model, tmp_path, capsys):
    def said(source, *more):
        assert convert(source, tmp_path / "out", *more) == 1
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    merge = ("--adapter", "merge")
    assert "holds adapters alone" in said(saved / "checkpoints")
    assert "no checkpoint of a run" in said(tiny_model, *merge)
    assert "no checkpoint of a run" in said(tmp_path / "nothing", *merge)
    other = tmp_path / "other"
    shutil.copytree(tiny_model, other)
    weights = (other / "model.safetensors").read_bytes()
    (other / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    assert "fingerprints differ" in said(saved / "checkpoints", *merge, "--base", str(other))
    for key, value in (("rank", "4"), ("rank", 0), ("alpha", -1), ("targets", "x")):
        copy = tmp_path / f"{key}{value}" / "step_1"
        shutil.copytree(saved / "checkpoints" / "step_1", copy)
        state = json.loads((copy / "state.json").read_text())["state"]
        change(copy, ADAPTER, {**state[ADAPTER], key: value})
        assert "no settings of adapters" in said(copy, "--adapter", "export")
    damaged = tmp_path / "damaged" / "step_1"
    shutil.copytree(saved / "checkpoints" / "step_1", damaged)
    file = next(damaged.glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))
    assert "not as it was saved" in said(damaged, "--adapter", "export")
    with pytest.raises(SystemExit):
        convert(saved / "checkpoints", tmp_path / "out", *merge, "--verify")
