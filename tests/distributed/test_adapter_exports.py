"""GRPO from an adapter of PEFT: the engine gets merged weights, or the adapters for its own LoRA.

At the end PEFT loads `adapter/`, and `hf/` is what PEFT merges. On two ranks with the real engine.
"""

from pathlib import Path

import pytest
import torch

from megatron_sr1.checkpoint.hf_files import HFSource
from megatron_sr1.checkpoint.peft_files import PeftAdapter
from megatron_sr1.demo.digits import make_digits
from megatron_sr1.observability.metrics import read_lines
from tests.peft_adapters import LANGUAGE, base_model, peft_adapter

ROOT = Path(__file__).resolve().parents[2]
WAYS = {
    "merged": ["parallel.tensor=2", "rollout.tensor_parallel=1", "model.freeze=[]"],
    "engine": ["rollout.lora=engine", "rollout.sleep_level=1", "rollout.tensor_parallel=2"],
}


@pytest.fixture(scope="module", params=WAYS)
def run(request, tiny_model, join_as_ranks, tmp_path_factory):
    """Two steps from an adapter that differs from the base, so that the KL term has a gradient."""
    folder = tmp_path_factory.mktemp(request.param)
    shards = make_digits(folder, 1, num_train=24, num_eval=6, num_cold_start=1)
    peft_adapter(tiny_model, target_modules=LANGUAGE, use_rslora=True).save_pretrained(
        folder / "start"
    )
    join_as_ranks(
        *(2, "train", ROOT / "examples" / "digits_cpu.yaml", f"model.path={tiny_model}"),
        *(f"evaluation.sets.{way}.path={shards['eval']}" for way in ("greedy", "sampled")),
        *(f"data.train={shards['train']}", "evaluation.at_start=true"),
        *(f"output={folder / 'run'}", "optimizer.num_steps=2"),
        *("data.prompts_per_step=4", "algorithm.prompts_per_update=2"),
        *("algorithm.kl_coefficient=0.1", "optimizer.learning_rate=1e-2"),
        *("rollout.samples_per_prompt=2", "rollout.mismatch_bound=1e-3"),
        *("rollout.make_room=weights", "rollout.canary_bound=0"),
        *("adapter.rank=4", "adapter.alpha=6", "adapter.scaling=rslora"),
        *(f"adapter.path={folder / 'start'}", *WAYS[request.param]),
    )
    return folder


@pytest.mark.slow
def test_engine_and_actor_agree_and_peft_reads_what_was_trained(run, tiny_model):
    import peft

    lines = read_lines(run / "run" / "metrics.jsonl")[1:]
    assert [line["step"] for line in lines] == [1, 2]
    assert all(0 < line["mismatch/abs_max"] < 1e-3 for line in lines)
    assert all(line["optimizer/grad_norm"] > 0 for line in lines)
    start, end = PeftAdapter(run / "start"), PeftAdapter(run / "run" / "adapter")
    assert start.settings == end.settings and start.modules == end.modules
    assert all(not torch.equal(end.read(name), tensor) for name, tensor in start.tensors())
    made = peft.PeftModel.from_pretrained(base_model(tiny_model), run / "run" / "adapter")
    made.merge_and_unload().save_pretrained(run / "theirs")
    ours, theirs = HFSource(run / "run" / "hf"), HFSource(run / "theirs")
    assert ours.tensors.keys() == theirs.tensors.keys()
    for name in theirs.tensors:
        assert torch.equal(ours.read(name), theirs.read(name)), name


@pytest.mark.slow
def test_the_checkpoint_of_all_ranks_is_exported_as_what_the_run_exported(run):
    from tools.convert_checkpoint import main

    asked = ["megatron-to-hf", str(run / "run" / "checkpoints"), str(run / "exported")]
    assert main([*asked, "--adapter", "export"]) == 0
    ours, theirs = PeftAdapter(run / "exported"), PeftAdapter(run / "run" / "adapter")
    assert ours.settings == theirs.settings and ours.modules == theirs.modules
    for name, tensor in theirs.tensors():
        assert torch.equal(ours.read(name), tensor), name
