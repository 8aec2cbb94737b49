"""The published 3B, 7B, 32B and 72B, from their configurations in tests/published.

Only shapes are compared: there are no weights. A wrong number in a file would change the number of
parameters, which the publisher states for each model.
"""

import json
import math
from pathlib import Path

import pytest
import torch

from megatron_sr1.checkpoint.mapping import canonical_hf_name, entries
from megatron_sr1.model.hf_config import parse_hf_config
from megatron_sr1.runtime.cpu import patch_torchvision

PUBLISHED = Path(__file__).resolve().parents[1] / "published"
NUM_PARAMETERS = {
    "3b": 3_754_622_976,
    "7b": 8_292_166_656,
    "32b": 33_452_718_336,
    "72b": 73_410_777_344,
}


def raw_config(size):
    return json.loads((PUBLISHED / f"qwen25vl_{size}.json").read_text())


@pytest.mark.parametrize("size", NUM_PARAMETERS)
def test_the_mapping_has_every_published_parameter(size):
    shapes = [s for entry in entries(parse_hf_config(raw_config(size))) for s in entry.hf_shapes]
    assert sum(math.prod(shape) for shape in shapes) == NUM_PARAMETERS[size]


@pytest.mark.parametrize("size", NUM_PARAMETERS)
def test_flat_files_and_those_that_transformers_writes_are_read_alike(size):
    from transformers import Qwen2_5_VLConfig

    raw = raw_config(size)
    assert "text_config" not in raw
    nested = json.loads(Qwen2_5_VLConfig(**raw).to_json_string(use_diff=False))
    assert "text_config" in nested and "rope_scaling" not in nested
    flat, again = parse_hf_config(raw), parse_hf_config(nested)
    assert flat.text == again.text and flat.vision == again.vision
    assert flat.tie_word_embeddings == again.tie_word_embeddings == (size == "3b")
    assert flat.image_token_id == again.image_token_id == 151655


@pytest.mark.parametrize("size", NUM_PARAMETERS)
def test_the_mapping_has_the_names_and_shapes_of_transformers(size):
    patch_torchvision()
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    raw = raw_config(size)
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**raw))
    held = {canonical_hf_name(name): tuple(t.shape) for name, t in model.named_parameters()}
    mapped = {
        name: shape
        for entry in entries(parse_hf_config(raw))
        for name, shape in zip(entry.hf_names, entry.hf_shapes, strict=True)
    }
    assert mapped == held
