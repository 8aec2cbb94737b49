"""Layouts and kernels that cannot work are refused before anything is built."""

from dataclasses import replace

import pytest
import torch

from megatron_sr1.config.run import ModelConfig, ParallelConfig
from megatron_sr1.errors import ConfigError
from megatron_sr1.model.hf_config import check_layout
from megatron_sr1.model.qwen25_vl import build_model
from megatron_sr1.model.transformer_config import padded_vocab_size
from tests.unit.test_model_hf_config import FLAT, parse_hf_config

HF_CONFIG = parse_hf_config(FLAT)
ODD_TOWER = replace(HF_CONFIG, vision=replace(HF_CONFIG.vision, num_heads=15))


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"tensor": 4}, "num_key_value_heads is 2, which parallel.tensor=4"),
        ({"tensor": 3}, "num_attention_heads is 16, which parallel.tensor=3"),
        ({"tensor": 2}, "vision num_heads is 15, which .* parallel.vision=images"),
        ({"pipeline": 5}, "36 layers do not divide over parallel.pipeline=5"),
        ({"pipeline": 4, "virtual": 2}, r"parallel.pipeline=4 x virtual=2 stages"),
        ({"pipeline": 2, "stage_layers": [12, 12, 12]}, "3 stages with 36 layers; expected 2"),
        ({"pipeline": 2, "stage_layers": [17, 18]}, "with 35 layers; .* the model's 36"),
        ({"pipeline": 2, "stage_layers": [0, 36]}, "numbers .* of 1 or more"),
    ],
)
def test_a_layout_that_does_not_divide_the_model_is_refused(layout, message):
    hf_config = ODD_TOWER if "vision" in message else HF_CONFIG
    with pytest.raises(ConfigError, match=message):
        check_layout(hf_config, ParallelConfig(**layout))


def test_building_a_model_makes_the_same_checks(groups):
    with pytest.raises(ConfigError, match="do not divide over parallel.pipeline=5"):
        build_model(HF_CONFIG, groups, ModelConfig(dtype="float32"), ParallelConfig(pipeline=5))


def test_a_layout_that_divides_the_model_is_accepted():
    check_layout(HF_CONFIG, ParallelConfig(tensor=2))
    check_layout(ODD_TOWER, ParallelConfig(tensor=2, vision="images"))
    check_layout(HF_CONFIG, ParallelConfig(pipeline=2, virtual=2, stage_layers=[5, 11, 11, 9]))


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without CUDA")
def test_transformer_engine_without_cuda_is_refused_with_what_to_do(groups):
    with pytest.raises(ConfigError, match="model.spec=local"):
        build_model(HF_CONFIG, groups, ModelConfig(spec="transformer_engine"), ParallelConfig())


def test_a_vocabulary_is_padded_only_if_it_does_not_divide():
    assert padded_vocab_size(151936, 8) == 151936
    assert padded_vocab_size(257, 2) == 258
    assert padded_vocab_size(5, 4) == 8
