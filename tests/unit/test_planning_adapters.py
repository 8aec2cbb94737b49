"""What the planner counts of adapters, compared with Megatron's model and autograd on a CPU."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_sr1.checkpoint.adapters import attach_adapters, local_adapters
from megatron_sr1.config.adapter import AdapterConfig
from megatron_sr1.config.run import ModelConfig, ParallelConfig
from megatron_sr1.model import flops
from megatron_sr1.model.hf_config import parse_hf_config
from megatron_sr1.model.qwen25_vl import build_model
from megatron_sr1.planning.activations import Activations
from megatron_sr1.planning.adapters import planned_adapters
from megatron_sr1.planning.layout import Layout
from megatron_sr1.runtime import cpu
from tests.planned_models import fill, make_row, raw_config, saved_bytes
from tests.unit.test_flops import UNKNOWN

HF_CONFIG = parse_hf_config(raw_config())
TEXT, TOWER = AdapterConfig().targets, ["^visual[.]"]
TARGETS = {"text": TEXT, "attention": ["q_proj", "v_proj"], "all": TEXT + TOWER}
LENGTHS, GRID = [400, 130, 90, 20], (16, 24)
BYTES = {"float32": 4, "bfloat16": 2}


def adapted(groups, settings, dtype, recompute):
    """A model of random weights with adapters, both of whose matrices are not zero."""
    shape = ModelConfig(dtype=dtype, recompute=recompute, logprob_chunk_tokens=64)
    (chunk,) = build_model(HF_CONFIG, groups, shape, ParallelConfig())
    fill(chunk)
    attach_adapters([chunk], HF_CONFIG, groups, settings, seed=1)
    fill(chunk)
    return chunk


def kept(settings, dtype):
    adapters = planned_adapters(HF_CONFIG, settings, dtype)
    return Activations(HF_CONFIG, Layout(), BYTES[dtype], fused_mlp=False, adapters=adapters)


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("kind", [("float32", "float32"), ("bfloat16", "float32"),
                                  ("bfloat16", "model")])  # fmt: skip
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_text_activations_with_adapters_are_planned_within_8_percent(
    groups, targets, kind, recompute
):
    settings = AdapterConfig(rank=6, targets=TARGETS[targets], dtype=kind[1])
    chunk, planned = adapted(groups, settings, kind[0], recompute), kept(settings, kind[0])
    found = saved_bytes(chunk, make_row(HF_CONFIG, LENGTHS))
    layer = sum(LENGTHS) * planned.text_layer(recompute) + planned.text_matrices(recompute)
    total = layer * HF_CONFIG.text.num_layers + sum(LENGTHS) * planned.text_ends()
    assert total == pytest.approx(found, rel=0.08)


@pytest.mark.parametrize("targets", ["text", "all"])
@pytest.mark.parametrize("kind", [("float32", "float32"), ("bfloat16", "float32"),
                                  ("bfloat16", "model")])  # fmt: skip
def test_vision_activations_with_adapters_are_planned_within_8_percent(groups, targets, kind):
    settings = AdapterConfig(rank=6, targets=TARGETS[targets], dtype=kind[1])
    chunk, planned = adapted(groups, settings, kind[0], "none"), kept(settings, kind[0])
    without = saved_bytes(chunk, make_row(HF_CONFIG, [512]))
    found = saved_bytes(chunk, make_row(HF_CONFIG, [512], [GRID])) - without
    patches = GRID[0] * GRID[1]
    if targets == "text":  # nothing of the tower needs a gradient
        assert found < 0.02 * patches * planned.vision("none")
    else:
        assert patches * planned.vision("none") == pytest.approx(found, rel=0.08)


def test_dropout_keeps_a_mask_and_a_copy_for_each_published_layer(groups):
    settings = AdapterConfig(rank=6, dropout=0.1)
    chunk, planned = adapted(groups, settings, "bfloat16", "none"), kept(settings, "bfloat16")
    chunk.train()
    found = saved_bytes(chunk, make_row(HF_CONFIG, LENGTHS))
    layer = sum(LENGTHS) * planned.text_layer("none") + planned.text_matrices("none")
    total = layer * HF_CONFIG.text.num_layers + sum(LENGTHS) * planned.text_ends()
    # A CPU multiplies by a mask in the adapters' type, a GPU has one byte a value.
    assert total < found < 1.5 * total


@pytest.mark.parametrize("targets", ["text", "attention"])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_operations_with_adapters_are_what_torch_counts(groups, targets, recompute):
    """All of the sequence's square is counted by torch, and the first layer's inputs need none."""
    settings = AdapterConfig(rank=6, targets=TARGETS[targets])
    chunk, tokens = adapted(groups, settings, "float32", recompute), 300
    adapters = planned_adapters(HF_CONFIG, settings, "float32")
    counter = FlopCounterMode(display=False, custom_mapping=UNKNOWN)
    with cpu.megatron_mode(), counter:
        logprobs = chunk(**make_row(HF_CONFIG, [tokens]))
        there = counter.get_total_flops()
        logprobs.sum().backward()
    back = counter.get_total_flops() - there
    layers = flops.text_layer(HF_CONFIG, tokens, tokens).times(HF_CONFIG.text.num_layers)
    head, own = flops.head(HF_CONFIG, tokens), adapters.work(False, tokens)
    assert there == pytest.approx((layers + head + own).total, rel=1e-6)
    planned = flops.backward(layers + head, is_frozen=True) + head + flops.backward(own)
    planned += layers + own if recompute == "full" else flops.Work()
    assert back == pytest.approx(planned.total, rel=0.02)


def test_the_parameters_of_adapters_are_those_of_the_model(groups):
    for targets in TARGETS.values():
        settings = AdapterConfig(rank=6, targets=targets)
        chunk = adapted(groups, settings, "bfloat16", "none")
        adapters = planned_adapters(HF_CONFIG, settings, "bfloat16")
        found = [(entry, p.numel()) for entry, p in local_adapters([chunk])]
        assert adapters.numel == sum(numel for _, numel in found)
        tower = sum(numel for entry, numel in found if entry.name.startswith("vision_model"))
        assert adapters.tower_numel == tower and adapters.is_in_tower == (tower > 0)
        trained = [p for p in chunk.parameters() if p.requires_grad]
        assert len(trained) == len(found) and all(p.dtype == torch.float32 for p in trained)
