"""vLLM's own preprocessing of a prompt gives our expanded ids and our pixels, to the bit.

No engine is started: this is the processor that the engine would build for the directory. By
default vLLM hands the resized bytes on and normalises on the device, where float32 rounds
differently in the last place; with `mm_device_do_normalize=False` its floats are ours.
"""

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_sr1.config.training import DataConfig
from megatron_sr1.data.processor import Processor
from megatron_sr1.data.prompts import Prompts
from megatron_sr1.records import Example, Message
from megatron_sr1.runtime.cpu import patch_torchvision

LIMITS = (3136, 50176)  # not the directory's own: the limits themselves must arrive
SIZES = [(84, 28), (300, 500), (40, 44)]


@pytest.fixture(scope="module")
def vllm_config(tiny_model):
    patch_torchvision()
    import vllm
    from vllm.config import ModelConfig
    from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration

    vllm.ModelRegistry.register_model(
        "Qwen2_5_VLForConditionalGeneration", Qwen2_5_VLForConditionalGeneration
    )

    def make(**options):
        size = {"shortest_edge": LIMITS[0], "longest_edge": LIMITS[1]}
        return ModelConfig(
            model=str(tiny_model),
            dtype="float32",
            mm_processor_kwargs={"size": size},
            **options,
        )

    return make


PROMPTS = Prompts(DataConfig(), "vision_sr1")


@pytest.fixture(scope="module")
def ours(tiny_model):
    return Processor(tiny_model, *LIMITS)


@pytest.fixture(scope="module")
def prompt(ours):
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(256, size=(h, w, 3), dtype=np.uint8)) for w, h in SIZES]
    example = Example(0, "k", "s", (Message("user", "<image>a<image>b<image>"),), None, 3)
    return ours.encode_prompt(example, images, PROMPTS.pass1_messages(example))


def apply(processor, prompt):
    """What vLLM's processor makes of a collapsed prompt."""
    from vllm.multimodal.processing import ProcessorInputs, TimingContext

    items = processor.info.parse_mm_data({"image": list(prompt.images)})
    inputs = ProcessorInputs(list(prompt.engine_token_ids), mm_data_items=items)
    return processor.apply(inputs, TimingContext(enabled=False))


def through_vllm(config, prompt):
    """(token ids, pixels, grids) of a collapsed prompt as vLLM expands it, and its processor."""
    from vllm.multimodal import MULTIMODAL_REGISTRY

    processor = MULTIMODAL_REGISTRY.create_processor(config)
    got = apply(processor, prompt)
    data = got["mm_kwargs"].get_data()
    pixels, grids = data["pixel_values"], data["image_grid_thw"]
    pixels = torch.cat(list(pixels)) if isinstance(pixels, list) else pixels
    grids = torch.stack(list(grids)) if isinstance(grids, list) else grids
    return tuple(got["prompt_token_ids"]), pixels, grids.reshape(-1, 3), processor


def test_the_engine_expands_our_collapsed_ids_to_ours(vllm_config, ours, prompt):
    ids, _, grids, processor = through_vllm(vllm_config(), prompt)
    assert ids == prompt.token_ids
    assert tuple(map(tuple, grids.tolist())) == prompt.image_grid_thw
    name = type(processor.info.get_image_processor()).__name__
    assert name == type(ours.image_processor).__name__ == "Qwen2VLImageProcessor"


def test_pixels_normalised_by_its_processor_are_ours_to_the_bit(vllm_config, ours, prompt):
    _, pixels, _, _ = through_vllm(vllm_config(mm_device_do_normalize=False), prompt)
    assert torch.equal(pixels, ours.vision(prompt.images).pixel_values)


def test_pixels_normalised_on_the_device_are_ours_but_for_rounding(vllm_config, ours, prompt):
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.fusion.mm_input_norm import build_mm_input_norm

    config = vllm_config()
    _, pixels, _, _ = through_vllm(config, prompt)
    raw = ours.image_processor(
        list(prompt.images), do_rescale=False, do_normalize=False, return_tensors="pt"
    )["pixel_values"]
    assert pixels.dtype == torch.uint8 and torch.equal(pixels, raw)
    with set_current_vllm_config(VllmConfig()):
        normalised = build_mm_input_norm(config).forward_native(pixels, torch.float32)
    wanted = ours.vision(prompt.images).pixel_values
    assert (normalised - wanted).abs().max() < 1e-6


@pytest.mark.field
def test_images_of_equal_bytes_and_other_shapes_do_not_share_a_cache_entry(vllm_config, ours):
    """120 x 80 and 80 x 120 pixels of one buffer, after the same question."""
    noise = np.random.default_rng(0).integers(256, size=120 * 80 * 3, dtype=np.uint8).tobytes()
    example = Example(0, "k", "s", (Message("user", "<image>Which?"),), None, 1)
    messages = PROMPTS.pass1_messages(example)
    hashes = []
    for size, grid in (((120, 80), (1, 6, 8)), ((80, 120), (1, 8, 6))):
        asked = ours.encode_prompt(example, [Image.frombytes("RGB", size, noise)], messages)
        ids, _, grids, processor = through_vllm(vllm_config(), asked)
        assert asked.image_grid_thw == tuple(map(tuple, grids.tolist())) == (grid,)
        assert ids == asked.token_ids
        hashes += apply(processor, asked)["mm_hashes"]["image"]
    assert len(set(hashes)) == 2
