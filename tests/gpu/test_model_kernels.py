"""Transformer Engine's layers compute what the local ones do, on CUDA."""

import pytest
import torch

from tests.model_cases import make_row, write_case

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("seed", [3, 16])
def test_transformer_engine_equals_local_layers_in_bfloat16(seed, tmp_path):
    pytest.importorskip("transformer_engine.pytorch")
    from megatron_sr1.checkpoint.hf import load_hf
    from megatron_sr1.config.run import ModelConfig, ParallelConfig
    from megatron_sr1.model.hf_config import read_hf_config
    from megatron_sr1.model.qwen25_vl import build_model
    from megatron_sr1.records import VisionInputs
    from megatron_sr1.runtime.device import select_device, start_distributed
    from megatron_sr1.runtime.groups import make_groups

    device = select_device("cuda")
    start_distributed(device)
    groups = make_groups(ParallelConfig(), device)
    _, rows = write_case(tmp_path, seed)
    hf_config = read_hf_config(tmp_path)
    row = make_row(rows[0])
    vision = VisionInputs(row.vision.pixel_values.cuda(), row.vision.image_grid_thw)
    inputs = {n: v.cuda() if torch.is_tensor(v) else v for n, v in row.inputs.items()}
    logits = []
    for spec in ("local", "transformer_engine"):
        chunks = build_model(hf_config, groups, ModelConfig(spec=spec), ParallelConfig())
        load_hf(chunks, tmp_path, hf_config, groups)
        with torch.no_grad():
            logits.append(chunks[0](**{**inputs, "vision": vision}))
    assert logits[0].isfinite().all()
    assert (logits[0] - logits[1]).abs().max() < 0.1
