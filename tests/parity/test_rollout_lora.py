"""The engine's own LoRA against PEFT: adapters alone are sent, and logprobs are those of PEFT."""

import json
import re

import pytest
import rollout_setup as setup
import torch

from megatron_sr1.checkpoint.peft_files import PeftAdapter
from megatron_sr1.config.adapter import AdapterConfig
from megatron_sr1.config.loading import load_config
from megatron_sr1.config.rollout import RolloutConfig
from megatron_sr1.dry_run import _check_shape as check_shape
from megatron_sr1.errors import ConfigError, EngineError
from megatron_sr1.model.hf_config import read_hf_config
from megatron_sr1.rollout.engine import Engine
from megatron_sr1.runtime.device import select_device, start_distributed
from tests.peft_adapters import LANGUAGE, peft_adapter

BOUND = 1e-3  # nats, float32
ADAPTER = AdapterConfig(rank=4, alpha=6.0)
SOME = r".*language_model\..*(q_proj|v_proj|up_proj)"  # of fused layers, a part


@pytest.fixture(scope="module")
def engine(tiny_model):
    start_distributed(select_device("cpu"))
    settings = RolloutConfig(max_model_len=256, max_num_seqs=64, lora="engine", sleep_level=1)
    return Engine(tiny_model, settings, setup.processor(tiny_model), adapter=ADAPTER)


@torch.no_grad()
def gap(engine, model, model_dir, name):
    """Largest |engine - PEFT| of sampled tokens' and of given tokens' logprobs, nats."""
    worst = 0.0
    for number, images in enumerate((1, 0, 2)):
        prompt = setup.prompt(model_dir, number, images)
        asked = [setup.request(prompt, f"{name}{k}", max_tokens=12, seed=k) for k in range(4)]
        for completion in engine.generate(asked):
            ids = completion.token_ids
            theirs = torch.tensor(setup.reference_logprobs(model_dir, prompt, ids, model=model))
            ours = torch.tensor(completion.logprobs)
            scored = torch.tensor(engine.logprobs(prompt.token_ids, ids, prompt.vision))
            worst = max(worst, (ours - theirs).abs().max(), (scored - theirs).abs().max())
    return float(worst)


@pytest.mark.slow
def test_the_engine_computes_with_the_adapters_it_was_sent_last(tiny_model, engine, tmp_path):
    before = setup.reference(tiny_model)
    assert gap(engine, before, tiny_model, "base") < BOUND
    for version, (targets, rslora) in enumerate(
        ((LANGUAGE, False), (LANGUAGE, True), (SOME, True))
    ):
        made = peft_adapter(tiny_model, seed=version, target_modules=targets, use_rslora=rslora)
        made.save_pretrained(tmp_path / str(version))
        ADAPTER.scaling = "rslora" if rslora else "standard"
        stored = PeftAdapter(tmp_path / str(version))
        given = dict(stored.tensors())
        engine.sync_adapters(given.items(), version)
        assert engine.weight_version == version
        # The actor's own tensors stay as they are.
        assert all(torch.equal(given[name], tensor) for name, tensor in stored.tensors())
        assert gap(engine, made, tiny_model, f"{version}/") < BOUND
        with made.disable_adapter():
            assert gap(engine, made, tiny_model, f"off {version}/") > 10 * BOUND
        engine.sleep()
        engine.wake()
    unknown = {"model.layers.7.mlp.up_proj.lora_A.weight": torch.ones(4, 128)}
    with pytest.raises(EngineError, match=r"no LoRA for 1 modules: .*layers.7.mlp.up_proj"):
        engine.sync_adapters(unknown.items(), 9)
    with pytest.raises(EngineError, match="weight sync 9 failed"):
        engine.generate([setup.request(setup.prompt(tiny_model, 0), "after")])


@pytest.mark.parametrize("other", ["visual.blocks.0.attn.qkv", "visual.merger.mlp.0"])
def test_modules_that_the_engine_cannot_serve_are_refused_before_a_start(tiny_model, other):
    keys = [f"model.path={tiny_model}", "rollout.lora=engine", "rollout.sleep_level=1"]
    keys += ["stage=grpo", "adapter.rank=4", "rollout.max_model_len=4096"]
    keys += ["data.max_prompt_tokens=2000"]
    hf_config = read_hf_config(tiny_model)
    check_shape(load_config(None, keys), hf_config)
    targets = json.dumps([f"^{re.escape(other)}$", "^model.*up_proj$"])
    with pytest.raises(ConfigError, match=f"match 1 other modules, as {other}; set"):
        check_shape(load_config(None, [*keys, f"adapter.targets={targets}"]), hf_config)


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        (["adapter.rank=0"], "needs adapters"),
        (["adapter.rank=513"], "rollout.lora=engine: adapter.rank=513 is above 512"),
        (["rollout.sleep_level=2"], "rollout.sleep_level=2"),
        (["rollout.quantization=fp8_per_channel"], "rollout.quantization=fp8_per_channel"),
    ],
)
def test_settings_that_do_not_go_with_the_engines_lora_are_refused(keys, named):
    base = ["model.path=m", "stage=grpo", "rollout.lora=engine", "rollout.sleep_level=1"]
    load_config(None, [*base, "adapter.rank=8"])
    with pytest.raises(ConfigError, match=named):
        load_config(None, [*base, "adapter.rank=8", *keys])
