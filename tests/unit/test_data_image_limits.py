"""The largest image: the limit holds for every size, is reached, and is used everywhere."""

import json
import random
import shutil
from pathlib import Path
from types import SimpleNamespace as Of

import pytest
from PIL import Image

from megatron_sr1.config.loading import load_config
from megatron_sr1.config.rollout import RolloutConfig
from megatron_sr1.data.images import largest_pixels
from megatron_sr1.data.processor import Processor
from megatron_sr1.errors import ConfigError, DataError
from megatron_sr1.model.hf_config import parse_hf_config
from megatron_sr1.planning.activations import max_patches
from megatron_sr1.planning.layout import Layout
from megatron_sr1.planning.workload import planned_run
from megatron_sr1.rollout.vllm_api import device_arguments
from megatron_sr1.runtime.gpus import GPUS
from tools import scoring_backends

pytestmark = pytest.mark.field
ROOT = Path(__file__).resolve().parents[2]
LIMITS = [(784, 784), (3136, 3136), (784, 3136), (784, 200704), (200704, 200704)]
LIMITS += [(262144, 262144), (784, 15680), (262144, 4194304)]


@pytest.fixture(scope="module")
def processor(tiny_model):
    return Processor(tiny_model, 784, 200704)


def resized(processor, width, height):
    """Pixels of an image after resizing, by the published processor's own function."""
    image = Image.new("1", (width, height))
    t, h, w = processor.grid(image)
    assert t == 1 and h > 0 and w > 0
    return h * w * processor.patch_size**2


@pytest.mark.parametrize("limits", LIMITS)
def test_no_image_exceeds_the_limit_and_some_thin_or_square_one_reaches_it(tiny_model, limits):
    processor = Processor(tiny_model, *limits)
    bound = largest_pixels(*limits, 28)
    assert processor.max_image_tokens == bound // 784
    rng = random.Random(0)
    sizes = [(side, side) for side in (1, 13, 28, 500, 512, 530, 2000)]
    sizes += [(n, 200 * n) for n in range(1, 41)] + [(n, 150 * n) for n in range(1, 41)]
    for _ in range(500):
        short = rng.randint(1, 600)
        sizes.append((short, rng.randint(short, min(200 * short, 8000))))
    found = max(resized(processor, *size) for size in sizes)
    assert found <= bound
    if limits[1] < 200704 or limits[0] == limits[1]:  # else sizes that few pictures have meet it
        assert found == bound


def test_equal_limits_are_exceeded_by_rounding(tiny_model):
    processor = Processor(tiny_model, 262144, 262144)
    assert resized(processor, 500, 500) == 532 * 532 > 262144
    assert largest_pixels(262144, 262144, 28) == 56 * 7252  # of 30 x 6000 pixels
    assert resized(processor, 30, 6000) == 56 * 7252
    assert (
        resized(Processor(tiny_model, 784, 3136), 28, 5600)
        == 21952
        == (largest_pixels(784, 3136, 28))
    )


def test_every_image_has_a_patch(processor):
    assert [processor.grid(Image.new("1", s))[1:] for s in ((10, 600), (13, 13), (1, 1))] == [
        (16, 2),
        (2, 2),
        (2, 2),
    ]
    image = Image.new("RGB", (10, 600))
    assert processor.vision([image]).image_grid_thw.tolist() == [[1, 16, 2]]


@pytest.mark.parametrize("least", [0, 1, 783])
def test_less_than_a_patch_is_refused(tiny_model, least):
    with pytest.raises(ConfigError, match=f"min_pixels={least} is less than a patch of 28 x 28"):
        Processor(tiny_model, least, 200704)


def test_a_smallest_above_the_largest_is_refused(tiny_model):
    with pytest.raises(ConfigError, match="min_pixels=3136 is more than max_pixels=784"):
        Processor(tiny_model, 3136, 784)


def write_settings(tiny_model, folder, new=None, old=None):
    """A model directory whose image processor is set in either file, or both."""
    shutil.copytree(tiny_model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    path = folder / "preprocessor_config.json"
    usual = json.loads(path.read_text())
    for name in ("min_pixels", "max_pixels", "size"):
        usual.pop(name, None)
    path.unlink()
    if old is not None:
        path.write_text(json.dumps({**usual, **old}))
    if new is not None:
        nested = {"image_processor": {**usual, **new}, "processor_class": "Qwen2_5_VLProcessor"}
        (folder / "processor_config.json").write_text(json.dumps(nested))
    return folder


PIXELS = {"min_pixels": 1568, "max_pixels": 50176}
SIZE = {"size": {"shortest_edge": 1568, "longest_edge": 50176}}
OTHER = {"size": {"shortest_edge": 784, "longest_edge": 784}}


@pytest.mark.parametrize(
    "files",
    [
        {"old": PIXELS},
        {"old": SIZE},
        {"new": PIXELS},
        {"new": SIZE},
        {"new": SIZE, "old": OTHER},
        {"new": PIXELS, "old": OTHER},
        {"old": {**OTHER, **PIXELS}},
    ],
    ids=str,
)
def test_the_models_own_limits_are_read_in_both_files_and_spellings(tiny_model, tmp_path, files):
    processor = Processor(write_settings(tiny_model, tmp_path / "m", **files))
    assert (processor.min_pixels, processor.max_pixels) == (1568, 50176)
    assert processor.grid(Image.new("RGB", (10, 10))) == (1, 4, 4)
    assert (processor.patch_size, processor.merge_size) == (14, 2)


def test_given_limits_replace_those_of_the_model(tiny_model, tmp_path):
    folder = write_settings(tiny_model, tmp_path / "m", new=SIZE)
    processor = Processor(folder, 784)
    assert (processor.min_pixels, processor.max_pixels) == (784, 50176)
    assert processor.grid(Image.new("RGB", (56, 28))) == (1, 2, 4)
    processor = Processor(folder, None, 3136)
    assert (processor.min_pixels, processor.max_pixels) == (1568, 3136)
    processor = Processor(folder, 784, 3136)
    images = [Image.new("RGB", s) for s in ((56, 28), (300, 200), (7, 9))]
    grids = [list(processor.grid(image)) for image in images]
    assert processor.vision(images).image_grid_thw.tolist() == grids


@pytest.mark.parametrize("size", [{"height": 28, "width": 28}, {"shortest_edge": 0}, {}])
def test_settings_without_limits_are_named(tiny_model, tmp_path, size):
    folder = write_settings(tiny_model, tmp_path / "m", old={"size": size})
    with pytest.raises(DataError, match="/m: .*(image processor|limits)"):
        Processor(folder)


def test_scoring_reads_the_models_limits(tiny_model, tmp_path):
    """56 x 28 pixels under a smallest area of 784 are 2 tokens, as saved by transformers 5."""
    small = {"size": {"shortest_edge": 784, "longest_edge": 200704}}
    folder = write_settings(tiny_model, tmp_path / "m", new=small)
    source = Of(hf_files=folder)
    processor = scoring_backends.make_processor(Of(min_pixels=None, max_pixels=None), source)
    pad = processor.image_pad_id
    line = Of(where="line 1", prompt=(30, pad, pad, 31), response=(7,))
    image = Image.new("RGB", (56, 28))
    assert scoring_backends.train_sample(0, line, [image], processor).image_grid_thw == ((1, 2, 4),)
    processor = scoring_backends.make_processor(Of(min_pixels=4704, max_pixels=None), source)
    with pytest.raises(DataError, match="line 1: the images make a prompt of 10 tokens"):
        scoring_backends.train_sample(0, line, [image], processor)


def test_the_planner_uses_the_largest_image_after_rounding():
    keys = ["data.min_pixels=262144", "data.max_pixels=262144"]
    config = load_config(ROOT / "examples" / "qwen25vl_7b.yaml", keys)
    published = ROOT / "tests" / "published" / "qwen25vl_7b.json"
    hf_config = parse_hf_config(json.loads(published.read_text()))
    layout = Layout(tensor=4, data=2, sequence=True, vision="images")
    run = planned_run(config, hf_config, GPUS["h100"], {"image_tokens": 1.0})
    assert max_patches(run, layout) == 4 * largest_pixels(262144, 262144, 28) / 784 == 4 * 518


def test_the_engines_step_holds_the_largest_image_after_rounding():
    """vLLM's encoder takes no image of more tokens than a step has; its own limit is 8192."""
    given = [
        device_arguments(
            "cuda",
            "bfloat16",
            RolloutConfig(max_model_len=length),
            Of(max_image_tokens=tokens, min_pixels=784, max_pixels=784 * tokens),
        )
        for tokens, length in ((5349, 32768), (9000, 32768), (9000, 8192))
    ]
    assert [a.get("max_num_batched_tokens") for a in given] == [None, 9000, None]
