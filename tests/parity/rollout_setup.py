"""One engine and one transformers model for all rollout tests of a process: a start takes 20 s."""

import functools

import numpy as np
import torch
from PIL import Image

from megatron_sr1.config.rollout import RolloutConfig
from megatron_sr1.data.processor import Processor
from megatron_sr1.records import Example, Message
from megatron_sr1.rollout.engine import Engine, Request
from megatron_sr1.runtime.device import select_device, start_distributed

MIN_PIXELS, MAX_PIXELS = 784, 50176
SIZES = ((84, 28), (170, 120), (56, 200), (300, 190))
"""Width and height; the second and fourth are wider than a vision window (112 pixels), the last is
scaled down."""


@functools.cache
def processor(model_dir):
    return Processor(model_dir, MIN_PIXELS, MAX_PIXELS)


@functools.cache
def engine(model_dir, dtype="float32", **settings):
    """Return the engine, and whether its start preserved the random state of the process."""
    start_distributed(select_device("cpu"))
    before = torch.get_rng_state()
    started = Engine(
        model_dir,
        RolloutConfig(max_model_len=256, max_num_seqs=128, **settings),
        processor(model_dir),
        dtype=dtype,
        seed=3,
    )
    return started, torch.equal(before, torch.get_rng_state())


@functools.cache
def reference(model_dir):
    from transformers import Qwen2_5_VLForConditionalGeneration

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(model_dir, dtype=torch.float32)
    return model.eval()


def image(number, size):
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def prompt(model_dir, index, num_images=1):
    """A prompt of the real processor with random images of different sizes."""
    images = [image(10 * index + k, SIZES[(index + k) % len(SIZES)]) for k in range(num_images)]
    parts = [{"type": "image"}] * num_images + [{"type": "text", "text": "Which digit is largest?"}]
    turn = Message("user", "<image>" * num_images + "Which digit is largest?")
    example = Example(index, f"key{index}", "shard0.tar", (turn,), "7", num_images)
    messages = [{"role": "user", "content": parts}]
    made = processor(model_dir)
    return made.encode_prompt(example, made.vision(images), messages)


def request(prompt, name, **settings):
    return Request(name, prompt.token_ids, prompt.vision, **settings)


@torch.no_grad()
def reference_logits(model_dir, prompt, response, model=None):
    """Logits [response, vocabulary] of transformers, or of `model`, that predict the response."""
    ids = torch.tensor([[*prompt.token_ids, *response]])
    kwargs = {}
    if prompt.vision:
        kwargs = {
            "pixel_values": prompt.vision.pixel_values,
            "image_grid_thw": prompt.vision.image_grid_thw,
            "mm_token_type_ids": (ids == processor(model_dir).image_pad_id).long(),
        }
    model = model or reference(model_dir)
    logits = model(input_ids=ids, **kwargs).logits[0]
    return logits[len(prompt.token_ids) - 1 : -1]


def reference_logprobs(model_dir, prompt, response, temperature=1.0, model=None):
    logits = reference_logits(model_dir, prompt, response, model) / temperature
    return logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0].tolist()
