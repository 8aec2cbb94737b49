"""Layouts and kernels that cannot work are refused before anything is built."""

from dataclasses import replace

import pytest
import torch

from megatron_sr1.errors import ConfigError
from megatron_sr1.model.build import build_model
from megatron_sr1.model.transformer_config import check_layout, padded_vocab_size
from tests.unit.test_model_hf_config import FLAT, parse_hf_config

HF_CONFIG = parse_hf_config(FLAT)


@pytest.mark.parametrize(
    ("group", "size", "message"),
    [
        ("tensor", 4, "num_key_value_heads is 2, which parallel.tensor=4"),
        ("tensor", 3, "num_attention_heads is 16, which parallel.tensor=3"),
        ("pipeline", 5, "36 layers do not divide over parallel.pipeline=5"),
    ],
)
def test_a_layout_that_does_not_divide_the_model_is_refused(groups, group, size, message):
    larger = replace(groups, **{group: replace(getattr(groups, group), size=size)})
    with pytest.raises(ConfigError, match=message):
        check_layout(HF_CONFIG, larger, False)


def test_a_layout_that_divides_the_model_is_taken(groups):
    check_layout(HF_CONFIG, replace(groups, tensor=replace(groups.tensor, size=2)), True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without CUDA")
def test_transformer_engine_without_cuda_is_refused_with_what_to_do(groups):
    with pytest.raises(ConfigError, match="model.spec=local"):
        build_model(HF_CONFIG, groups, dtype=torch.float32, spec="transformer_engine")


def test_a_vocabulary_is_padded_only_if_it_does_not_divide():
    assert padded_vocab_size(151936, 8) == 151936
    assert padded_vocab_size(257, 2) == 258
    assert padded_vocab_size(5, 4) == 8
