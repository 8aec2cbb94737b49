"""What the engine is given is what vLLM's own preprocessing would make of a prompt, to the bit.

No engine is started: this is the processor that the engine would build for the directory, with the
setting that the engine has: pixels are normalised on the host.
"""

import numpy as np
import pytest
from PIL import Image

from megatron_sr1.config.training import DataConfig
from megatron_sr1.data.processor import Processor
from megatron_sr1.data.prompts import Prompts
from megatron_sr1.records import Example, Message
from megatron_sr1.rollout.engine import Request
from megatron_sr1.rollout.vllm_api import engine_input
from megatron_sr1.runtime.cpu import patch_torchvision
from tools.scoring_backends import collapse

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

    size = {"shortest_edge": LIMITS[0], "longest_edge": LIMITS[1]}
    return ModelConfig(
        model=str(tiny_model),
        dtype="float32",
        mm_processor_kwargs={"size": size},
        mm_device_do_normalize=False,
    )


PROMPTS = Prompts(DataConfig(), "vision_sr1")


@pytest.fixture(scope="module")
def ours(tiny_model):
    return Processor(tiny_model, *LIMITS)


def encoded(ours, text, images):
    example = Example(0, "k", "s", (Message("user", text),), None, len(images))
    return ours.encode_prompt(example, ours.vision(images), PROMPTS.pass1_messages(example))


def through_vllm(config, prompt, images, pad):
    """vLLM's processor, and what it makes of a prompt with one pad per image."""
    from vllm.multimodal import MULTIMODAL_REGISTRY
    from vllm.multimodal.processing import ProcessorInputs, TimingContext

    processor = MULTIMODAL_REGISTRY.create_processor(config)
    items = processor.info.parse_mm_data({"image": list(images)})
    inputs = ProcessorInputs(list(collapse(prompt.token_ids, pad)), mm_data_items=items)
    return processor, processor.apply(inputs, TimingContext(enabled=False))


@pytest.mark.parametrize("num_images", [1, 3])
def test_a_prompt_is_prepared_as_vllm_itself_does(vllm_config, ours, num_images):
    rng = np.random.default_rng(0)
    sizes = SIZES[:num_images]
    images = [Image.fromarray(rng.integers(256, size=(h, w, 3), dtype=np.uint8)) for w, h in sizes]
    prompt = encoded(ours, "".join(f"<image>{k} " for k in range(num_images)), images)
    processor, theirs = through_vllm(vllm_config, prompt, images, ours.image_pad_id)
    request = Request("a", prompt.token_ids, prompt.vision)
    got = engine_input(request, (ours.image_pad_id, ours.merge_size))
    assert got.keys() == theirs.keys() and got["type"] == theirs["type"]
    assert got["prompt_token_ids"] == theirs["prompt_token_ids"]
    assert got["mm_placeholders"] == theirs["mm_placeholders"]
    assert got["mm_kwargs"] == theirs["mm_kwargs"]  # pixels and grids, and how batches join them
    hashes = [one["mm_hashes"]["image"] for one in (got, theirs)]
    assert [len(set(one)) for one in hashes] == [num_images, num_images]
    name = type(processor.info.get_image_processor()).__name__
    assert name == type(ours.image_processor).__name__ == "Qwen2VLImageProcessor"


@pytest.mark.field
def test_images_of_equal_bytes_and_other_shapes_do_not_share_a_cache_entry(ours):
    """120 x 80 and 80 x 120 pixels of one buffer, after the same question."""
    noise = np.random.default_rng(0).integers(256, size=120 * 80 * 3, dtype=np.uint8).tobytes()
    hashes = []
    for size, grid in (((120, 80), (1, 6, 8)), ((80, 120), (1, 8, 6))):
        asked = encoded(ours, "<image>Which?", [Image.frombytes("RGB", size, noise)])
        assert asked.image_grid_thw == (grid,)
        request = Request("a", asked.token_ids, asked.vision)
        hashes += engine_input(request, (ours.image_pad_id, ours.merge_size))["mm_hashes"]["image"]
    assert len(set(hashes)) == 2
