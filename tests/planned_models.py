"""Small configurations for the planner's tests: every width another number, so that none hides."""

import json

import torch

from megatron_sr1.records import VisionInputs
from megatron_sr1.runtime import cpu

TEXT = {
    "hidden_size": 64,
    "intermediate_size": 172,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]},
}
VISION = {
    "depth": 3,
    "hidden_size": 48,
    "intermediate_size": 100,
    "num_heads": 4,
    "in_chans": 3,
    "patch_size": 14,
    "window_size": 112,
    "fullatt_block_indexes": [1],
}


def raw_config(vocab_size=131, tied=False, text=None, vision=None):
    """A config.json; the last four ids are vision start, vision end, image and video pad."""
    text = {**TEXT, **(text or {})}
    return {
        "model_type": "qwen2_5_vl",
        **text,
        "vocab_size": vocab_size,
        "tie_word_embeddings": tied,
        "vision_start_token_id": vocab_size - 4,
        "vision_end_token_id": vocab_size - 3,
        "image_token_id": vocab_size - 2,
        "video_token_id": vocab_size - 1,
        "vision_config": {**VISION, "out_hidden_size": text["hidden_size"], **(vision or {})},
    }


def write_config(directory, **changes):
    """A model directory without weights."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(raw_config(**changes)))


def make_row(hf_config, lengths, grids=()):
    """Arguments of the model's forward: random ids, images in the first sequence."""
    merge = hf_config.vision.spatial_merge_size
    tokens, pads = sum(lengths), sum(h * w for h, w in grids) // merge**2
    assert pads < lengths[0]
    ids = torch.randint(0, hf_config.text.vocab_size - 4, (1, tokens))
    ids[0, :pads] = hf_config.image_token_id
    vision = None
    if grids:
        patches = sum(h * w for h, w in grids)
        pixels = torch.randn(patches, hf_config.vision.patch_dim)
        vision = VisionInputs(pixels, torch.tensor([(1, h, w) for h, w in grids]))
    return {
        "input_ids": ids,
        "position_ids": torch.arange(tokens).expand(3, 1, -1),
        "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0).int(),
        "vision": vision,
        "labels": ids,
    }


def fill(chunk):
    """Small random weights in place of the NaN of an unloaded model."""
    with torch.no_grad():
        for parameter in chunk.parameters():
            parameter.normal_(0, 0.02)


def saved_bytes(chunk, row):
    """Memory that a forward pass keeps for the backward one, parameters aside; once a storage."""
    weights = {p.untyped_storage().data_ptr() for p in chunk.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, or its place is reused
        return tensor

    with cpu.megatron_mode(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = chunk(**row)
    assert output.requires_grad
    return sum(nbytes for nbytes, _ in kept.values())
