"""Pixels read ahead by threads: each image once, the same pixels, errors in their place."""

import threading

import pytest
import torch

from megatron_sr1.config.loading import load_config
from megatron_sr1.data.loader import Loader
from megatron_sr1.data.processor import Processor
from megatron_sr1.demo.digits import make_digits
from megatron_sr1.errors import DataError
from megatron_sr1.trainer.samples import Samples


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    make_digits(folder, 1, num_train=12, num_eval=1, num_cold_start=1)
    return folder / "train"


@pytest.fixture
def samples(tiny_model, folder, monkeypatch):
    """Makes samples with a number of threads, and the list of what is read: (index, thread)."""

    def make(threads):
        keys = [f"model.path={tiny_model}", f"data.train={folder}", f"data.image_threads={threads}"]
        made = Samples(load_config(None, keys), folder, Processor(tiny_model, 784, 200704))
        read, images = [], made.reader.images

        def recorded(index):
            read.append((index, threading.current_thread() is threading.main_thread()))
            if index == 5:
                raise DataError("broken")
            return images(index)

        monkeypatch.setattr(made.reader, "images", recorded)
        return made, read

    return make


def test_what_was_started_is_read_once_by_threads_for_engine_and_trainer(samples):
    (ahead, read), (late, _) = samples(2), samples(0)
    ahead.pixels.start(range(4))
    ahead.pixels.start(range(5))
    prompts = [ahead.prompt(index) for index in range(4)]
    ahead.pixels.start(range(4))  # they are held by now
    ahead.pixels.finish()
    assert sorted(read) == [(index, False) for index in range(5)]
    for index, prompt in enumerate(prompts):
        assert ahead.vision(index) is prompt.vision
        assert torch.equal(prompt.vision.pixel_values, late.prompt(index).vision.pixel_values)
    assert len(read) == 5


def test_text_that_was_read_ahead_is_kept_for_the_next_step(samples, monkeypatch):
    (made, _), read = samples(2), []
    example = made.reader.example
    monkeypatch.setattr(made.reader, "example", lambda index: read.append(index) or example(index))
    made.prompt(0)
    made.pixels.start([1])
    made.pixels.finish()
    made.forget()
    for index in (0, 1):
        made.prompt(index)
    assert read == [0, 1, 0]


def test_without_threads_or_a_start_images_are_read_when_they_are_needed(samples):
    for made, read in (samples(0), samples(2)):
        if made.pixels._pool is None:
            made.pixels.start([1, 2])
        made.prompt(1)
        made.pixels.finish()
        assert read == [(1, True)]


def test_an_error_comes_when_the_sample_is_needed(samples):
    made, _ = samples(2)
    made.pixels.start([5, 6])
    made.pixels.finish()
    assert made.prompt(6).vision is not None
    with pytest.raises(DataError, match="broken"):
        made.prompt(5)


def test_what_is_read_ahead_outlives_the_step_and_the_rest_does_not(samples):
    made, read = samples(1)
    made.prompt(0)
    made.pixels.start([1])
    made.forget()
    made.pixels.finish()
    made.prompt(1)
    assert [index for index, _ in read] == [0, 1]
    made.prompt(0)
    assert [index for index, _ in read] == [0, 1, 0]


def test_the_upcoming_step_is_the_next_one_and_is_not_consumed():
    loader, alone = (Loader((7, 5), 6, 1, shares={"a": 0.5, "b": 0.5}) for _ in range(2))
    for _ in range(9):  # over the ends of epochs, where samples are deferred
        before = loader.state_dict()
        told = loader.upcoming()
        assert loader.state_dict() == before and loader.upcoming() == told
        assert loader.next_step() == told == alone.next_step()
        assert loader.more(1, told) == alone.more(1, told)
