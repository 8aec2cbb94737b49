"""The canary of a weight sync passes if all is well and fails if the engine keeps old weights.

Not covered: more than one rank; tests/distributed runs whole steps with it (the demo's settings).
"""

from dataclasses import replace

import pytest
import torch

from megatron_sr1.config.loading import load_config
from megatron_sr1.demo.digits import make_digits
from megatron_sr1.errors import ConfigError, EngineError
from megatron_sr1.trainer.actor import freeze, load_actor_model, make_actor
from megatron_sr1.trainer.context import Context
from megatron_sr1.trainer.samples import Samples, make_processor
from megatron_sr1.trainer.sync import Canary, start_engine, sync

BOUND = 1e-3


@pytest.fixture(scope="module")
def run(tiny_model, groups, tmp_path_factory):
    """Context, actor, engine and samples of one process."""
    folder = tmp_path_factory.mktemp("canary")
    make_digits(folder, 1, num_train=8, num_eval=2, num_cold_start=2)
    config = load_config(
        "examples/digits_cpu.yaml",
        [
            *(f"model.path={tiny_model}", f"data.train={folder / 'train'}", f"output={folder}"),
            *("evaluation.sets=", "rollout.max_num_seqs=8"),
        ],
    )
    processor = make_processor(config)
    samples = Samples(config, config.data.train, processor)
    chunks, hf_config, source = load_actor_model(config, groups)
    actor = make_actor(config, chunks, hf_config, source, groups, 1)
    engine = start_engine(config, groups, processor)
    return Context(config, groups, 0), actor, engine, samples


def change(actor, seed, names):
    """Move the actor's weights whose published name has one of `names`."""
    generator = torch.Generator().manual_seed(seed)
    moved = 0
    with torch.no_grad():
        for chunk in actor.chunks:
            for name, parameter in chunk.named_parameters():
                if any(part in name for part in names):
                    parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
                    moved += 1
    assert moved


def test_engine_and_actor_agree_after_syncs_and_a_stale_encoder_cache_is_caught(run, monkeypatch):
    context, actor, engine, samples = run
    canary = Canary(samples, BOUND)
    for version in (0, 1):
        engine.sync(actor.weights(), version)
        found = canary.check(context, actor, engine)["mismatch/canary_abs_max"]
        assert 0 <= found < 1e-4
        change(actor, version, ("",))
    with pytest.raises(EngineError, match="canary: engine and actor disagree"):
        canary.check(context, actor, engine)  # the actor moved on and was not synced
    engine.sync(actor.weights(), 2)
    canary.check(context, actor, engine)
    monkeypatch.setattr(engine._llm.llm_engine, "reset_encoder_cache", lambda: None)
    change(actor, 7, ("vision", "visual"))
    engine.sync(actor.weights(), 3)
    with pytest.raises(EngineError, match="canary.*earlier ones"):
        canary.check(context, actor, engine)
    monkeypatch.undo()
    engine.sync(actor.weights(), 4)
    assert canary.check(context, actor, engine)["mismatch/canary_abs_max"] < 1e-4


def test_frozen_layers_are_sent_once_and_the_engine_keeps_them(run, monkeypatch):
    context, actor, engine, samples = run
    canary, everything = Canary(samples, BOUND), {name for name, _ in actor.weights()}
    bias = "layers.0.self_attn.[qkv]_proj.bias"
    frozen = freeze(actor.chunks, actor.hf_config, ["^visual[.]", "layers.0.mlp", bias])
    assert {n for n in everything if n.startswith("visual.") or "layers.0.mlp" in n} == frozen
    come = []
    real = engine.sync

    def watched(weights, version, whole):
        weights = list(weights)
        come.append({name for name, _ in weights})
        real(weights, version, whole)

    monkeypatch.setattr(engine, "sync", watched)
    for version in (5, 6, 7):
        context.step = version
        sync(context, replace(actor, frozen=frozen), engine, again=version > 5)
        assert canary.check(context, actor, engine)["mismatch/canary_abs_max"] < 1e-4
        parts = ("decoder.final_layernorm", "decoder.layers.1.", "embedding")
        change(actor, version, [f"language_model.{part}" for part in parts])
    assert come == [everything, everything - frozen, everything - frozen]
    change(actor, 8, ("vision", "visual"))  # against what was said: the engine must miss it
    context.step = 8
    sync(context, replace(actor, frozen=frozen), engine, again=True)
    with pytest.raises(EngineError, match="canary"):
        canary.check(context, actor, engine)


def test_a_set_without_images_has_no_canary(run):
    *_, samples = run

    class TextOnly:
        reader = samples.reader

        def example(self, index):
            return replace(samples.example(index), num_images=0)

    with pytest.raises(ConfigError, match="needs a sample with an image.*set it to 0"):
        Canary(TextOnly(), BOUND)
