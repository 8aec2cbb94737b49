"""Published configurations, flat and nested, and those that are refused."""

import copy
import json

import pytest

from megatron_sr1.errors import CheckpointError, ConfigError
from megatron_sr1.model.hf_config import parse_hf_config, read_hf_config

TEXT = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 128000,
    "rms_norm_eps": 1e-6,
    "use_sliding_window": False,
}
VISION = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
    "out_hidden_size": 2048,
}
IDS = {
    "model_type": "qwen2_5_vl",
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
}
FLAT = {
    **IDS,
    **TEXT,
    "rope_theta": 1000000.0,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "tie_word_embeddings": True,
    "vision_config": {**VISION, "in_chans": 3, "spatial_patch_size": 14},
}
NESTED = {
    **IDS,
    "text_config": {
        **TEXT,
        "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1000000.0,
            "mrope_section": [16, 24, 24],
        },
    },
    "vision_config": {**VISION, "in_channels": 3},
}


def test_flat_and_nested_files_give_the_same_configuration():
    flat, nested = parse_hf_config(FLAT), parse_hf_config(NESTED)
    assert flat.text == nested.text and flat.vision == nested.vision
    assert flat.tie_word_embeddings and nested.tie_word_embeddings
    assert flat.text.head_dim == 128 and flat.text.mrope_section == (16, 24, 24)
    assert flat.vision.patch_dim == 1176 and flat.vision.window_units == 4


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("rope_scaling", "type"), "yarn", "yarn"),
        (("rope_scaling", "mrope_section"), [16, 24, 20], "64"),
        (("use_sliding_window",), True, "sliding"),
        (("hidden_act",), "gelu", "silu"),
        (("num_key_value_heads",), 3, "3"),
        (("vision_config", "out_hidden_size"), 3584, "3584"),
        (("vision_config", "window_size"), 14, "28 pixels"),
        (("vision_config", "num_heads"), 640, "multiple of 4"),
    ],
)
def test_unsupported_settings_are_refused_by_name(path, value, message):
    changed = copy.deepcopy(FLAT)
    place = changed
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(ConfigError, match=message):
        parse_hf_config(changed)


def test_a_directory_without_a_readable_configuration_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="config.json: no such file"):
        read_hf_config(tmp_path)
    path = tmp_path / "config.json"
    path.write_text("{")
    with pytest.raises(CheckpointError, match="not JSON"):
        read_hf_config(tmp_path)
    path.write_text(json.dumps({**FLAT, "model_type": "qwen3_vl"}))
    with pytest.raises(CheckpointError, match="qwen3_vl"):
        read_hf_config(tmp_path)
    path.write_text(json.dumps({k: v for k, v in FLAT.items() if k != "hidden_size"}))
    with pytest.raises(CheckpointError, match="hidden_size"):
        read_hf_config(tmp_path)
