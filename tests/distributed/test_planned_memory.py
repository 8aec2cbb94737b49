"""The planner's bytes of weights, gradients, optimizer and checkpoint equal the real ones.

On a CPU with Megatron's own buffers and optimizers, on every rank of every layout. Not covered:
Transformer Engine's layers, whose parameters come in another order.
"""

import json
from pathlib import Path

import pytest

from tests.planned_models import write_config

SCRIPT = Path(__file__).parent / "ranks" / "planned_memory.py"
# 131 ids are divided by neither 2 nor 4; 132 by both.
MODELS = {
    "tied": {"tied": True},
    "untied": {},
    "even": {"vocab_size": 132},
    "deep": {"text": {"num_hidden_layers": 9}},
    "deep-tied": {"tied": True, "text": {"num_hidden_layers": 9}},
}
CASES = [
    "untied:1x1x1:float32",
    "tied:1x1x1:bfloat16",
    "untied:2x1x1:bfloat16",
    "tied:2x1x1s:bfloat16",
    "tied:4x1x1s:low",
    "tied:1x2x1:bfloat16",
    "untied:1x4x1:bfloat16",
    "tied:2x2x1:low",
    "even:2x2x1s:float32",
    "tied:1x2x1:float32-whole",
    "untied:2x1x1s:bfloat16-whole",
    "even:1x2x1:offload",
    "tied:1x1x1:lowest",
    "untied:1x2x1:lowest",
    "untied:2x1x1:frozen",
    "deep:1x2x1:bfloat16:stage_layers=[3,6]",
    "deep-tied:1x4x1:low:stage_layers=[1,3,3,2]",
    "tied:1x2x1v:bfloat16",
    "untied:1x2x1v:bfloat16-whole",
    "deep-tied:2x2x1sv:bfloat16:stage_layers=[1,4,2,2]",
    "deep:1x4x1v:float32:stage_layers=[1,1,1,2,1,1,1,1]",
    "deep:1x2x1:frozen:virtual=3 stage_layers=[1,2,1,2,1,2]",
    "untied:2x1x1si:bfloat16",
    "tied:4x1x1i:lowest",
    "untied:2x1x1i:frozen",
    "even:2x2x1i:low:stage_layers=[1,3]",
    "untied:1x1x2:bfloat16",
    "tied:2x1x2si:float32",
    "tied:1x2x2v:bfloat16",
    "tied:1x1x1:adapters",
    "untied:2x1x1s:adapters",
    "even:2x2x1s:adapters-model",
    "deep-tied:1x4x1:adapters-low:stage_layers=[1,3,3,2]",
    "tied:2x1x1si:adapters-tower",
    "untied:1x2x2v:adapters",
]


@pytest.fixture(scope="module")
def found(run_ranks, tmp_path_factory):
    """Per case a list of what each of four ranks planned and held."""
    out = tmp_path_factory.mktemp("planned")
    for name, changes in MODELS.items():
        write_config(out / "models" / name, **changes)
    run_ranks(SCRIPT, 4, out / "models", out / "found.json", *CASES, timeout=900)
    ranks = json.loads((out / "found.json").read_text())
    return {line["case"]: [rank[i] for rank in ranks] for i, line in enumerate(ranks[0])}


@pytest.mark.parametrize("case", CASES)
def test_planned_bytes_are_what_megatron_allocates(found, case):
    assert len(found[case]) == 4
    for rank in found[case]:
        assert rank["planned"] == rank["held"]
        assert all(rank["held"].values())


@pytest.mark.parametrize("case", CASES)
def test_activations_of_a_rank_are_planned_within_8_percent(found, case):
    """Text and images, of all micro-batches that Megatron's schedule holds at a time."""
    for rank in found[case]:
        assert rank["planned_activations"] == pytest.approx(rank["held_activations"], rel=0.08)


def test_ranks_of_one_layout_can_hold_different_state(found):
    """The comparison above can fail: the last shard of a bucket is not as full as the others."""
    state = {rank["held"]["optimizer"] for rank in found["tied:1x1x1:bfloat16"]}
    assert len(state) > 1
