"""An engine quantises the weights of a sync in the same way as those it started with.

On a CPU with FP8 and one scale per channel; not covered: other formats, which need CUDA.
"""

import pytest
import rollout_setup as setup
import torch
from safetensors.torch import load_file

from megatron_sr1.config.loading import load_config
from megatron_sr1.errors import ConfigError, EngineError

PROMPT, RESPONSE = (1, 40, 41, 42, 43, 44, 45), (50, 61, 72, 83, 94)


@pytest.fixture(scope="module")
def engine(tiny_model):
    return setup.engine(tiny_model, dtype="bfloat16", quantization="fp8_per_channel")[0]


def weight_types(engine):
    worker = engine._core.engine_core.engine_core.model_executor.driver_worker.worker
    return {name: p.dtype for name, p in worker.model_runner.model.named_parameters()}


def test_a_sync_quantises_the_new_weights(tiny_model, engine):
    weights = load_file(tiny_model / "model.safetensors")
    types = weight_types(engine)
    quantised = [name for name, kind in types.items() if kind == torch.float8_e4m3fn]
    assert len(quantised) == 2 * 4 + 2 * 4 + 2  # decoder, tower, its merger
    before = engine.logprobs(PROMPT, RESPONSE)
    generator = torch.Generator().manual_seed(0)
    others = {
        name: w + 0.02 * torch.randn(w.shape, generator=generator) for name, w in weights.items()
    }
    found = []
    for version, sent in enumerate((weights, others, weights)):
        engine.sync(iter(sent.items()), version)
        found.append(engine.logprobs(PROMPT, RESPONSE))
        assert weight_types(engine) == types
    assert found[0] == found[2] == before
    assert max(abs(a - b) for a, b in zip(found[1], before, strict=True)) > 0.01


def test_a_missing_tensor_is_named_without_the_scales(tiny_model, engine):
    """The last test of the module: the engine cannot be used after it."""
    weights = load_file(tiny_model / "model.safetensors")
    absent = next(name for name in weights if name.endswith("layers.1.mlp.down_proj.weight"))
    del weights[absent]
    with pytest.raises(EngineError, match=r"1 layers or tensors .*layers.1.mlp.down_proj.weight;"):
        engine.sync(iter(weights.items()), 3)


def test_float32_weights_are_not_quantised():
    keys = ["model.path=m", "stage=grpo", "rollout.quantization=fp8_per_channel"]
    load_config(None, [*keys, "model.dtype=bfloat16"])
    with pytest.raises(ConfigError, match="rollout.quantization=fp8_per_channel is for weights in"):
        load_config(None, [*keys, "model.dtype=float32"])
