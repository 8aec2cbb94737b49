"""Formulas of operations compared with torch's counter on the real model.

The counter counts the whole square of a causal sequence, so `keys` is the sequence's length here.
It knows neither the CPU's attention kernel nor in-place addition of a product; UNKNOWN adds both.
"""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_sr1.config.run import ModelConfig, ParallelConfig
from megatron_sr1.model import flops
from megatron_sr1.model.hf_config import parse_hf_config
from megatron_sr1.model.qwen25_vl import build_model
from megatron_sr1.runtime import cpu
from tests.planned_models import fill, make_row, raw_config

SIZES = {
    "small": {},
    "tied": {"tied": True, "vocab_size": 200},
    "other": {
        "text": {"num_key_value_heads": 2, "intermediate_size": 300, "num_hidden_layers": 3},
        "vision": {"depth": 4, "hidden_size": 96, "fullatt_block_indexes": [0, 3]},
    },
}
TOKENS = 300
GRID = (16, 24)  # whole windows of 8 x 8 patches


def attention(query, key, *args, out_shape=None, **kwargs):
    batch, heads, queries, width = query
    return 4 * batch * heads * queries * key[2] * width


def attention_backward(gradient, query, key, *args, out_shape=None, **kwargs):
    batch, heads, queries, width = query
    return 10 * batch * heads * queries * key[2] * width


def added_product(total, left, right, out_shape=None, **kwargs):
    return 2 * left[0] * left[1] * right[1]


UNKNOWN = {
    torch.ops.aten.addmm_: added_product,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
}


def counted(hf_config, groups, row, recompute):
    """Return the operations of a forward pass and of its backward pass."""
    model = ModelConfig(dtype="float32", recompute=recompute, logprob_chunk_tokens=64)
    (chunk,) = build_model(hf_config, groups, model, ParallelConfig())
    fill(chunk)
    counter = FlopCounterMode(display=False, custom_mapping=UNKNOWN)
    with cpu.megatron_mode(), counter:
        logprobs = chunk(**row)
        there = counter.get_total_flops()
        logprobs.sum().backward()
    return there, counter.get_total_flops() - there


def planned(hf_config, patches, recompute):
    """Return the same by the formulas."""
    layers = flops.text_layer(hf_config, TOKENS, TOKENS).times(hf_config.text.num_layers)
    head = flops.head(hf_config, TOKENS)
    there, back = layers + head, flops.backward(layers) + flops.backward(head) + head
    if patches:
        blocks = flops.vision_blocks(hf_config, patches, patches)
        merger, pixels = flops.merger(hf_config, patches), flops.patch_embedding(hf_config, patches)
        there += blocks + merger + pixels
        back += flops.backward(blocks) + flops.backward(merger) + pixels
        back += blocks if recompute != "none" else flops.Work()
    again = {
        "none": flops.Work(),
        "selective": flops.text_mlp(hf_config, TOKENS).times(hf_config.text.num_layers),
        "full": layers,
    }
    return there.total, (back + again[recompute]).total


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("grids", [(), (GRID,)], ids=["text", "image"])
def test_formulas_count_what_torch_counts(groups, size, recompute, grids):
    hf_config = parse_hf_config(raw_config(**SIZES[size]))
    row = make_row(hf_config, [TOKENS], grids)
    patches = sum(h * w for h, w in grids)
    assert counted(hf_config, groups, row, recompute) == planned(hf_config, patches, recompute)


def test_the_whole_forward_pass_is_the_sum_of_its_parts():
    hf_config = parse_hf_config(raw_config())
    patches = GRID[0] * GRID[1]
    whole = flops.text(hf_config, TOKENS, TOKENS, before=TOKENS / 2)  # all keys, as planned()
    whole += flops.vision(hf_config, patches, patches)
    assert whole.total == planned(hf_config, patches, "none")[0]


@pytest.mark.parametrize("size", SIZES)
def test_patch_cost_is_what_a_patch_adds_to_a_forward_pass(size):
    hf_config = parse_hf_config(raw_config(**SIZES[size]))
    token = flops.text(hf_config, 1, 1)
    without, patches, with_one = ((token + flops.vision(hf_config, n, 0)).dense for n in (0, 8, 9))
    assert flops.patch_cost(hf_config) == pytest.approx((with_one - patches) / without)
