"""The Megatron model computes what transformers computes, in float32 on random small models.

Not covered here: more than one rank (tests/distributed/test_model_layouts.py), bfloat16, CUDA.
"""

import pytest
import torch

from megatron_sr1.checkpoint.hf import load_hf
from megatron_sr1.config import ParallelConfig
from megatron_sr1.model.hf_config import read_hf_config
from megatron_sr1.model.qwen25_vl import build_model
from megatron_sr1.runtime import cpu
from megatron_sr1.runtime.device import select_device, start_distributed
from megatron_sr1.runtime.groups import make_groups
from tests.model_cases import make_row, write_case

TOLERANCE = 1e-5
NUM_CASES = 20


@pytest.fixture(scope="module")
def groups():
    from megatron.core import parallel_state

    device = select_device("cpu")
    start_distributed(device)
    parallel_state.destroy_model_parallel()
    yield make_groups(ParallelConfig(), device)
    parallel_state.destroy_model_parallel()


def build(directory, groups, **options):
    hf_config = read_hf_config(directory)
    chunks = build_model(hf_config, groups, dtype=torch.float32, **options)
    load_hf(chunks, directory, hf_config, groups)
    return chunks[0]


@pytest.mark.parametrize("seed", range(NUM_CASES))
def test_logits_of_packed_rows_equal_transformers_one_sample_at_a_time(seed, tmp_path, groups):
    _, rows = write_case(tmp_path, seed)
    model = build(tmp_path, groups)
    with torch.no_grad(), cpu.megatron_mode():
        for samples in rows:
            logits = model(**make_row(samples).inputs)[0]
            expected = torch.cat([s.logits for s in samples])
            assert expected.abs().max() > 0.5
            assert (logits - expected).abs().max() < TOLERANCE
