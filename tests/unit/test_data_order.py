"""Order and identity of images and rows, after bug reports of other projects."""

import io
import logging
import shutil
from types import SimpleNamespace as Of

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_sr1.checkpoint.hf_files import HFSource, write_like
from megatron_sr1.config.evaluation import EvaluationSet
from megatron_sr1.config.loading import load_config
from megatron_sr1.data.examples import Record
from megatron_sr1.data.loader import Loader
from megatron_sr1.data.packing import pack_samples
from megatron_sr1.data.processor import Processor
from megatron_sr1.data.shards import write_shards
from megatron_sr1.evaluation.evaluate import HeldOut
from megatron_sr1.records import Message, TrainSample
from megatron_sr1.trainer.context import Context
from megatron_sr1.trainer.rollouts import read_prompts
from megatron_sr1.trainer.samples import Samples
from tests.checkpoint_files import files_of

pytestmark = pytest.mark.field


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def processor(tiny_model):
    return Processor(tiny_model, 784, 200704)


def samples_of(folder, records, processor, max_prompt_tokens=500):
    write_shards(records, folder)
    options = ["reward.recipe=vision_r1", "data.pass1_template=brief", "stage=sft", "data.train=x"]
    options += [f"data.max_prompt_tokens={max_prompt_tokens}", "model.path=x"]
    return Samples(load_config(None, options), folder, processor)


def sequence(samples, index):
    prompt = samples.prompt(index)
    ids = np.array(prompt.token_ids, np.int64)
    grids = prompt.image_grid_thw
    return TrainSample(index, len(grids), ids, np.arange(len(ids)) == len(ids) - 1, grids)


def packed(samples, indices):
    processor = samples.processor
    (batch,) = pack_samples(
        [sequence(samples, index) for index in indices],
        8192,
        samples.vision,
        image_pad_id=processor.image_pad_id,
        merge_size=processor.merge_size,
    )
    return batch


def test_two_images_of_equal_bytes_and_other_shapes_stay_two(processor, tmp_path):
    noise = np.random.default_rng(0).integers(256, size=120 * 80 * 3, dtype=np.uint8).tobytes()
    wide, high = (Image.frombytes("RGB", size, noise) for size in ((120, 80), (80, 120)))
    assert wide.tobytes() == high.tobytes()
    records = [
        Record((Message("user", "<image>Which?"),), "1", (png(image),)) for image in (wide, high)
    ]
    samples = samples_of(tmp_path, records, processor)
    for order in ((0, 1), (1, 0)):  # in one step, and in the next the other way round
        batch = packed(samples, order)
        grids = [(1, 6, 8), (1, 8, 6)]
        assert batch.vision.image_grid_thw.tolist() == [list(grids[i]) for i in order]
        first, second = batch.vision.pixel_values.split(48)
        assert not torch.equal(first, second)
        alone = processor.vision([(wide, high)[order[0]]]).pixel_values
        assert torch.equal(first, alone)


def test_twelve_images_come_in_order(processor, tmp_path):
    shades = [20 * n for n in range(12)]
    images = tuple(png(Image.new("RGB", (28, 28), (s, s, s))) for s in shades)
    text = "".join(f"{n} <image> " for n in range(12))
    records = [
        Record((Message("user", text),), "1", images),
        Record((Message("user", text),), "1", images[::-1]),
    ]
    samples = samples_of(tmp_path, records, processor)
    batch = packed(samples, (0, 1))
    assert len(batch.vision.image_grid_thw) == 24
    red = batch.vision.pixel_values[:, 0].reshape(24, 4)
    assert (red == red[:, :1]).all()
    assert red[:12, 0].tolist() == sorted(red[:12, 0].tolist()) and len(set(red[:12, 0])) == 12
    assert torch.equal(red[:12], red[12:].flip(0))


def test_a_prompt_that_is_too_long_leaves_the_others_order(processor, groups, tmp_path, caplog):
    """Ten rows, text and image by turns, row 5 too long; the same after a resume."""
    image = png(Image.new("RGB", (28, 28)))
    records = []
    for number in range(10):
        asked = f"row {number}" + " many more words" * (300 if number == 5 else 0)
        shown = (image,) if number % 2 else ()
        records.append(Record((Message("user", "<image>" * len(shown) + asked),), "1", shown))
    samples = samples_of(tmp_path, records, processor, max_prompt_tokens=100)
    paths = ["model.path=x", "data.train=x", f"output={tmp_path}"]
    context = Context(load_config(None, paths), groups, 0)

    def read(loader):
        drawn = loader.next_step()
        engine = Of(replica=0, num_replicas=1, is_replica_leader=True)
        prompts = read_prompts(context, engine, samples, drawn)
        context.count_skipped()
        return [p.example.index for p in prompts]

    loader = Loader([10], 4, seed=0, shuffle=False)
    assert read(loader) == [0, 1, 2, 3] and not context.skipped
    state = loader.state_dict()
    assert read(loader) == [4, 6, 7]
    resumed = Loader([10], 4, seed=0, shuffle=False)
    resumed.load_state_dict(state)
    assert read(resumed) == [4, 6, 7]
    assert context.skipped == 2
    assert "000000005: prompt of" in caplog.text
    halves = [Of(replica=r, num_replicas=2, is_replica_leader=True) for r in range(2)]
    found = [
        [p.example.index for p in read_prompts(context, half, samples, range(10))]
        for half in halves
    ]
    context.count_skipped()
    assert found == [[0, 2, 4, 6, 8], [1, 3, 7, 9]]
    assert not [r for r in caplog.records if r.levelno > logging.WARNING]
    # An evaluation during training reads the same questions again and again.
    context.config.data.max_skipped, before = 1, context.skipped
    context.config.evaluation.sets["held_out"] = EvaluationSet("x")
    whole = Of(replica=0, num_replicas=1, is_replica_leader=True)
    held_out = HeldOut(context, whole, samples, "held_out", None)
    for _ in range(3):
        held_out.skipped = 0
        assert len(held_out.prompts(range(10))) == 9 and context.skipped == before


def test_the_likelihood_is_of_the_first_gold_answer_out_of_its_box(processor, tmp_path):
    asked = (Message("user", "q"),)
    records = [
        Record(asked, "7", other_answers=("8",)),
        Record(asked, "So it is \\boxed{7}"),
    ]
    samples = samples_of(tmp_path, records, processor)
    found = [samples.gold_answer(samples.prompt(index)) for index in range(2)]
    decode = processor.tokenizer.decode
    assert [decode((*lead, *ids)) for lead, ids in found] == ["\\boxed{7}"] * 2


def test_files_beside_the_weights_come_through_byte_for_byte(tiny_model, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(tiny_model, source)
    more = {
        "README.md": b"kept\r\n",
        "merges.txt": b"#version\na b\n",
        "generation_config.json": b'{"eos_token_id": [2, 290], "temperature": 0.1}',
        "chat_template.json": b'{"chat_template": "x"}',
        "processor_config.json": b'{"image_processor": {}}',
        "notes/deep/data.bin.txt": bytes(range(256)),
    }
    for name, data in more.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(data)
    stored = HFSource(source)
    values = ((name, stored.read(name)) for name in stored.tensors)
    write_like(stored, tmp_path / "hf", values)
    assert files_of(tmp_path / "hf") == files_of(source)
    assert more.keys() <= {str(name) for name in files_of(tmp_path / "hf")}
