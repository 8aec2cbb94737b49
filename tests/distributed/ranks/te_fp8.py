"""Which layers run in FP8, and under which recipe; see test_te_double.py.

Run as `te_fp8.py CASE` with the double on the path. Megatron-Core's own code makes the recipe and
enters the region; the double's layers say in which they are called.
"""

import sys
from pathlib import Path

import torch
import transformer_engine
import transformer_engine.pytorch as te
from transformer_engine.pytorch.fp8 import STATE

from megatron_sr1.checkpoint.hf import load_hf
from megatron_sr1.config.run import ModelConfig, ParallelConfig
from megatron_sr1.errors import ConfigError
from megatron_sr1.model import layers, qwen25_vl
from megatron_sr1.model.hf_config import read_hf_config
from megatron_sr1.model.transformer_config import FP8_RECIPES
from megatron_sr1.runtime import cpu
from megatron_sr1.runtime.device import select_device, start_distributed, stop_distributed
from megatron_sr1.runtime.groups import make_groups
from tests.distributed.ranks.model_layouts import samples_of
from tests.model_cases import make_row

EXPECTED = {
    "delayed": ("DelayedScaling", {"fp8_dpa": False, "fp8_mha": False, "margin": 0}),
    "current": ("Float8CurrentScaling", {"fp8_dpa": False}),
    "blockwise": ("Float8BlockScaling", {}),
    "mxfp8": ("MXFP8BlockScaling", {}),
}
NUM_LAYERS = 4


def run(directory, groups, format_, recipe, kept):
    """Logits, and for each linear layer of the model the recipe that it was called under."""
    hf_config = read_hf_config(directory)
    assert hf_config.text.num_layers == NUM_LAYERS
    model = ModelConfig(
        dtype="float32",
        spec="transformer_engine",
        fp8=format_,
        fp8_recipe=recipe,
        bf16_layers_at_start=kept[0],
        bf16_layers_at_end=kept[1],
    )
    (chunk,) = qwen25_vl.build_model(hf_config, groups, model, ParallelConfig())
    load_hf([chunk], directory, hf_config, groups)
    seen = {}
    for name, module in chunk.named_modules():
        if isinstance(module, (te.Linear, te.LayerNormLinear)):
            module.register_forward_pre_hook(
                lambda _, __, name=name: seen.update({name: STATE["recipe"]})
            )
    row = make_row(samples_of(directory)[0], 32)
    with cpu.megatron_mode():
        return chunk(**row.inputs), seen


def check(seen, format_, recipe, kept):
    """FP8 in the language model's layers but the kept ones, and nowhere in the tower."""
    kind, fields = EXPECTED[recipe]
    layers = set(range(NUM_LAYERS))
    bf16 = {n for n in layers if n < kept[0] or n >= NUM_LAYERS - kept[1]}
    found = {n: set() for n in layers}
    for name, used in seen.items():
        if not name.startswith("language_model.decoder.layers."):
            assert name.startswith("vision_model.") and used is None, name
            continue
        found[int(name.split(".")[3])].add(used is not None)
        if used is not None:
            names = {k.__name__ for k in type(used).__mro__}
            assert kind in names and used.fp8_format.name == format_.upper(), (used, kind)
            assert all(getattr(used, k) == v for k, v in fields.items()), used
    assert any(name.startswith("vision_model.") for name in seen)
    assert found == {n: {n not in bf16} for n in layers}, (found, bf16)


def main():
    assert "te_double" in transformer_engine.__file__
    directory = Path(sys.argv[1])
    device = select_device("cpu")
    start_distributed(device)
    groups = make_groups(ParallelConfig(), device)
    layers.require_transformer_engine = lambda: None  # it asks for CUDA
    plain, _ = run(directory, groups, None, "delayed", (0, 0))
    num_runs = 0
    for recipe in FP8_RECIPES:
        for format_ in ("hybrid", "e4m3"):
            for kept in ((0, 0), (1, 0), (1, 2)) if recipe != "delayed" else ((0, 0),):
                logits, seen = run(directory, groups, format_, recipe, kept)
                check(seen, format_, recipe, kept)
                assert torch.equal(logits, plain)  # the double computes nothing in FP8
                num_runs += 1
    try:
        run(directory, groups, "hybrid", "current", (5, 0))
    except ConfigError as error:
        assert "at most the 4 layers" in str(error)
    else:
        raise AssertionError("five of four layers were taken")
    print(f"FP8 as asked in {num_runs} models", flush=True)
    stop_distributed()


if __name__ == "__main__":
    main()
