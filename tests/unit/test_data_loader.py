"""The order of samples: exactly once an epoch, resumable, independent of the layout."""

import json
from collections import Counter

import pytest

from megatron_sr1.data.loader import Loader
from megatron_sr1.errors import DataError


def draw(loader, steps):
    return [loader.next_step() for _ in range(steps)]


@pytest.mark.parametrize("per_step", [4, 5, 7, 10])
def test_every_sample_comes_exactly_once_an_epoch(per_step):
    loader = Loader(10, per_step, seed=3)
    drawn = [i for step in draw(loader, per_step * 6) for i in step]
    drawn = drawn[: len(drawn) // 10 * 10]
    counts = Counter(drawn)
    assert set(counts) == set(range(10))
    assert max(counts.values()) - min(counts.values()) <= 1  # those that wait for the next step


def test_steps_that_divide_the_dataset_are_whole_epochs():
    loader = Loader(12, 4, seed=1)
    epochs = [sum(draw(loader, 3), []) for _ in range(3)]
    assert all(sorted(e) == list(range(12)) for e in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != list(range(12))


def test_no_step_holds_a_sample_twice():
    loader = Loader(10, 7, seed=0)
    assert all(len(set(step)) == 7 for step in draw(loader, 300))


def test_a_step_larger_than_the_dataset_is_still_filled():
    assert Counter(Loader(3, 6, seed=0).next_step()) == {0: 2, 1: 2, 2: 2}


def test_without_shuffling_samples_keep_the_order_of_the_dataset():
    assert draw(Loader(5, 2, seed=9, shuffle=False), 4) == [[0, 1], [2, 3], [4, 0], [1, 2]]


def test_the_seed_decides_the_order():
    assert draw(Loader(50, 5, 1), 20) == draw(Loader(50, 5, 1), 20)
    assert draw(Loader(50, 5, 1), 20) != draw(Loader(50, 5, 2), 20)


@pytest.mark.parametrize("stop", range(0, 23, 2))
def test_a_resumed_loader_continues_as_if_never_stopped(stop):
    whole = draw(Loader(10, 7, seed=5), 30)
    first = Loader(10, 7, seed=5)
    draw(first, stop)
    second = Loader(10, 7, seed=5)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert draw(second, 30 - stop) == whole[stop:]


def test_another_step_size_after_resume_still_gives_every_sample_once():
    first = Loader(100, 7, seed=5)
    drawn = sum(draw(first, 10), [])
    second = Loader(100, 6, seed=5)
    second.load_state_dict(first.state_dict())
    assert sorted(drawn + sum(draw(second, 5), [])) == list(range(100))


@pytest.mark.parametrize("change", [{"num_samples": 11}, {"seed": 6}, {"shuffle": False}])
def test_a_cursor_of_another_order_is_refused(change):
    state = Loader(10, 2, seed=5).state_dict()
    options = {"num_samples": 10, "seed": 5, "shuffle": True, **change}
    other = Loader(options["num_samples"], 2, options["seed"], options["shuffle"])
    with pytest.raises(DataError, match=next(iter(change))):
        other.load_state_dict(state)


def test_an_empty_dataset_is_refused():
    with pytest.raises(DataError, match="empty"):
        Loader(0, 1, 0)


def test_further_samples_of_a_step_are_not_in_it_already():
    loader = Loader(10, 7, seed=0)
    for _ in range(200):
        step = loader.next_step()
        step += loader.more(2, step)
        assert len(step) == 9 and len(set(step)) == 9
        step += loader.more(5, step)  # only one is left
        assert sorted(step) == list(range(10))
        assert loader.more(1, step) == []


@pytest.mark.parametrize("per_step", [3, 5, 7, 10])
def test_with_refills_every_sample_still_comes_exactly_once_an_epoch(per_step):
    loader, counts = Loader(10, per_step, seed=3), Counter(range(10))
    for number in range(200):
        step = loader.next_step()
        for refill in range(number % 4):
            step += loader.more((number + refill) % 5, step)
        assert len(set(step)) == len(step)
        counts.update(step)
        waiting = Counter(counts) + Counter(loader.state_dict()["waiting"])
        assert max(waiting.values()) - min(waiting.values()) <= 1


def test_a_loader_resumed_between_steps_continues_with_the_same_refills():
    def steps(loader, count):
        for number in range(count):
            step = loader.next_step()
            yield step + loader.more(number % 3, step)

    whole = Loader(10, 4, seed=5)
    list(steps(whole, 9))
    other = Loader(10, 4, seed=5)
    other.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    assert list(steps(other, 9)) == list(steps(whole, 9))
