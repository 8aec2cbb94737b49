"""Token ids, positions and pixels equal transformers' own processor and model."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_sr1.data.packing import mrope_positions, pack_samples
from megatron_sr1.data.processor import Processor
from megatron_sr1.data.prompts import chat_messages
from megatron_sr1.records import Example, Message, TrainSample

LIMITS = (784, 50176)
SIZES = [(84, 28), (60, 100), (500, 33), (333, 250), (28, 28)]
# A template in the published manner: a default system turn, images counted, strings or parts.
TEMPLATE = (
    "{% set pictures = namespace(n=0) %}{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou help.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "{% set pictures.n = pictures.n + 1 %}"
    "{% if add_vision_id %}Picture {{ pictures.n }}: {% endif %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module", params=["tiny", "published manner"])
def directory(request, tiny_model, tmp_path_factory):
    if request.param == "tiny":
        return tiny_model
    path = tmp_path_factory.mktemp("published") / "model"
    shutil.copytree(tiny_model, path)
    (path / "chat_template.jinja").unlink()
    (path / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    return path


@pytest.fixture(scope="module")
def processor(directory):
    return Processor(directory, *LIMITS)


@pytest.fixture(scope="module")
def model(tiny_model):
    from transformers import Qwen2_5_VLForConditionalGeneration

    return Qwen2_5_VLForConditionalGeneration.from_pretrained(tiny_model).model


def pictures(count, seed=0):
    rng = np.random.default_rng(seed)
    return [
        Image.fromarray(rng.integers(256, size=(h, w, 3), dtype=np.uint8)) for w, h in SIZES[:count]
    ]


@pytest.mark.parametrize(
    ("turns", "count"),
    [
        ([("user", "\n\nWie groß?  12 345\n")], 0),
        ([("system", "Be brief."), ("user", "<image>What is the sum?")], 1),
        ([("user", "<image>a\n<image> b<image>"), ("assistant", "c"), ("user", "d<image>e")], 4),
    ],
)
def test_prompt_ids_and_pixels_are_those_of_transformers_processor(
    directory, processor, turns, count
):
    from transformers import Qwen2_5_VLProcessor

    theirs = Qwen2_5_VLProcessor.from_pretrained(directory)
    theirs.image_processor.size = {"shortest_edge": LIMITS[0], "longest_edge": LIMITS[1]}
    example = Example(0, "k", "s", tuple(Message(*t) for t in turns), None, count)
    messages = chat_messages(example.messages)
    images = pictures(count)
    text = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    wanted = theirs(text=[text], images=images or None, return_tensors="pt")
    vision = processor.vision(images)
    got = processor.encode_prompt(example, vision, messages)
    assert list(got.token_ids) == wanted["input_ids"][0].tolist()
    if count:
        assert torch.equal(vision.pixel_values, wanted["pixel_values"])
        assert torch.equal(vision.image_grid_thw, wanted["image_grid_thw"])
        assert [tuple(g) for g in vision.image_grid_thw.tolist()] == list(got.image_grid_thw)


def theirs(model, ids, grids, pad):
    ids = torch.as_tensor(ids)[None]
    types = (ids == pad).int()
    grid = torch.tensor(grids) if grids else None
    return model.get_rope_index(ids, types, image_grid_thw=grid)[0][:, 0]


def sequence(rng, pad, num_images):
    """Random text with that many images of random grids, sometimes at its very ends."""
    parts, grids = [rng.integers(20, 300, rng.integers(0, 6))], []
    for _ in range(num_images):
        t, h, w = 1, 2 * int(rng.integers(1, 9)), 2 * int(rng.integers(1, 9))
        grids.append((t, h, w))
        parts += [np.full(t * h * w // 4, pad), rng.integers(20, 300, rng.integers(1, 6))]
    return np.concatenate(parts).astype(np.int64), tuple(grids)


@pytest.mark.parametrize("num_images", [0, 1, 2, 5])
def test_positions_are_those_of_get_rope_index(processor, model, num_images):
    pad = processor.image_pad_id
    rng = np.random.default_rng(num_images)
    for _ in range(20):
        ids, grids = sequence(rng, pad, num_images)
        if not len(ids):
            continue
        sample = TrainSample(0, len(grids), ids, np.zeros(len(ids), bool), grids)
        got = mrope_positions([sample], image_pad_id=pad, merge_size=2)
        assert np.array_equal(got, theirs(model, ids, grids, pad).numpy())


def test_packed_positions_restart_at_each_sequence(processor, model):
    pad = processor.image_pad_id
    rng = np.random.default_rng(7)
    made = [sequence(rng, pad, n) for n in (2, 0, 1, 3, 0)]
    made = [(i, g) for i, g in made if len(i)]
    samples = [
        TrainSample(n, len(g), i, np.zeros(len(i), bool), g) for n, (i, g) in enumerate(made)
    ]
    (batch,) = pack_samples(samples, 10**6, None, image_pad_id=pad, merge_size=2, pad_multiple=64)
    borders = batch.cu_seqlens.tolist()
    for number, start, end in zip(batch.sample_ids, borders, borders[1:], strict=False):
        ids, grids = made[number]
        assert torch.equal(batch.position_ids[:, 0, start:end], theirs(model, ids, grids, pad))
