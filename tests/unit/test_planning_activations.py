"""Planned activations compared with what autograd keeps on a CPU, where MLPs are not fused.

Not covered: what a GPU's fused kernels keep, which the plan computes from the same terms without
the MLP's intermediate results.
"""

import pytest
import torch

from megatron_sr1.config.run import ModelConfig, ParallelConfig
from megatron_sr1.model.hf_config import parse_hf_config
from megatron_sr1.model.logprobs import label_logprobs
from megatron_sr1.model.qwen25_vl import build_model
from megatron_sr1.planning.activations import Activations
from megatron_sr1.planning.layout import Layout
from tests.planned_models import fill, make_row, raw_config, saved_bytes

HF_CONFIG = parse_hf_config(raw_config())
WIDER = parse_hf_config(
    raw_config(
        text={"num_key_value_heads": 8, "intermediate_size": 300, "num_hidden_layers": 2},
        vision={"depth": 5, "hidden_size": 96, "fullatt_block_indexes": [1, 3, 4]},
    )
)
DTYPES = {torch.float32: 4, torch.bfloat16: 2}
LENGTHS = ([256], [400, 130, 90, 20])
GRIDS = ([(20, 24)], [(32, 32), (8, 12), (20, 6)])


def activations(hf_config, dtype):
    return Activations(hf_config, Layout(), DTYPES[dtype], fused_mlp=False)


def model(hf_config, groups, dtype, recompute):
    shape = ModelConfig(dtype=str(dtype).removeprefix("torch."), recompute=recompute)
    (chunk,) = build_model(hf_config, groups, shape, ParallelConfig())
    fill(chunk)
    return chunk


@pytest.mark.parametrize("hf_config", [HF_CONFIG, WIDER])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_text_activations_are_planned_within_8_percent(
    groups, hf_config, dtype, recompute, lengths
):
    chunk = model(hf_config, groups, dtype, recompute)
    kept = saved_bytes(chunk, make_row(hf_config, lengths))
    planned = activations(hf_config, dtype)
    per_token = planned.text_layer(recompute) * hf_config.text.num_layers + planned.text_ends()
    assert sum(lengths) * per_token == pytest.approx(kept, rel=0.08)


@pytest.mark.parametrize("hf_config", [HF_CONFIG, WIDER])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("grids", GRIDS)
def test_vision_activations_are_planned_within_8_percent(
    groups, hf_config, dtype, recompute, grids
):
    chunk = model(hf_config, groups, dtype, recompute)
    without = saved_bytes(chunk, make_row(hf_config, [512]))
    kept = saved_bytes(chunk, make_row(hf_config, [512], grids)) - without
    patches = sum(height * width for height, width in grids)
    planned = activations(hf_config, dtype).vision(recompute)
    assert patches * planned == pytest.approx(kept, rel=0.08)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_peak_of_logits_is_planned_within_8_percent(groups, dtype):
    """Peak of live memory in the backward pass, by torch's count of allocations."""
    vocab, width, tokens, chunk = 5000, 64, 700, 256
    hidden = torch.randn(tokens, 1, width, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocab, width, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, vocab, (1, tokens))
    logprobs = label_logprobs(
        hidden, weight, labels, group=groups.tensor, vocab_size=vocab, chunk_tokens=chunk
    )
    with torch.profiler.profile(profile_memory=True) as profile:
        logprobs.sum().backward()
    live = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    hf_config = parse_hf_config(raw_config(vocab_size=vocab))
    assert activations(hf_config, dtype).logits(chunk) == pytest.approx(peak, rel=0.08)
