"""The order of samples: exactly once an epoch, resumable, independent of the layout."""

import bisect
import itertools
import json
from collections import Counter

import numpy as np
import pytest

from megatron_sr1.data.loader import Loader
from megatron_sr1.errors import DataError


def draw(loader, steps):
    return [loader.next_step() for _ in range(steps)]


@pytest.mark.parametrize("per_step", [4, 5, 7, 10])
def test_every_sample_comes_exactly_once_an_epoch(per_step):
    loader = Loader([10], per_step, seed=3)
    drawn = [i for step in draw(loader, per_step * 6) for i in step]
    drawn = drawn[: len(drawn) // 10 * 10]
    counts = Counter(drawn)
    assert set(counts) == set(range(10))
    assert max(counts.values()) - min(counts.values()) <= 1  # those that wait for the next step


def test_steps_that_divide_the_dataset_are_whole_epochs():
    loader = Loader([12], 4, seed=1)
    epochs = [sum(draw(loader, 3), []) for _ in range(3)]
    assert all(sorted(e) == list(range(12)) for e in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != list(range(12))


def test_no_step_holds_a_sample_twice():
    loader = Loader([10], 7, seed=0)
    assert all(len(set(step)) == 7 for step in draw(loader, 300))


def test_a_step_larger_than_the_dataset_is_still_filled():
    assert Counter(Loader([3], 6, seed=0).next_step()) == {0: 2, 1: 2, 2: 2}


def test_without_shuffling_samples_keep_the_order_of_the_dataset():
    assert draw(Loader([5], 2, seed=9, shuffle=False), 4) == [[0, 1], [2, 3], [4, 0], [1, 2]]


def test_the_seed_decides_the_order():
    assert draw(Loader([50], 5, 1), 20) == draw(Loader([50], 5, 1), 20)
    assert draw(Loader([50], 5, 1), 20) != draw(Loader([50], 5, 2), 20)


@pytest.mark.parametrize("stop", range(0, 23, 2))
def test_a_resumed_loader_continues_as_if_never_stopped(stop):
    whole = draw(Loader([10], 7, seed=5), 30)
    first = Loader([10], 7, seed=5)
    draw(first, stop)
    second = Loader([10], 7, seed=5)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert draw(second, 30 - stop) == whole[stop:]


def test_another_step_size_after_resume_still_gives_every_sample_once():
    first = Loader([100], 7, seed=5)
    drawn = sum(draw(first, 10), [])
    second = Loader([100], 6, seed=5)
    second.load_state_dict(first.state_dict())
    assert sorted(drawn + sum(draw(second, 5), [])) == list(range(100))


@pytest.mark.parametrize("change", [{"num_samples": 11}, {"seed": 6}, {"shuffle": False}])
def test_a_cursor_of_another_order_is_refused(change):
    state = Loader([10], 2, seed=5).state_dict()
    options = {"num_samples": 10, "seed": 5, "shuffle": True, **change}
    other = Loader([options["num_samples"]], 2, options["seed"], options["shuffle"])
    with pytest.raises(DataError, match=next(iter(change))):
        other.load_state_dict(state)


def test_an_empty_dataset_is_refused():
    with pytest.raises(DataError, match="empty"):
        Loader([0], 1, 0)


def test_further_samples_of_a_step_are_not_in_it_already():
    loader = Loader([10], 7, seed=0)
    for _ in range(200):
        step = loader.next_step()
        step += loader.more(2, step)
        assert len(step) == 9 and len(set(step)) == 9
        step += loader.more(5, step)  # only one is left
        assert sorted(step) == list(range(10))
        assert loader.more(1, step) == []


@pytest.mark.parametrize("per_step", [3, 5, 7, 10])
def test_with_refills_every_sample_still_comes_exactly_once_an_epoch(per_step):
    loader, counts = Loader([10], per_step, seed=3), Counter(range(10))
    for number in range(200):
        step = loader.next_step()
        for refill in range(number % 4):
            step += loader.more((number + refill) % 5, step)
        assert len(set(step)) == len(step)
        counts.update(step)
        waiting = Counter(counts) + Counter(loader.state_dict()["cursors"][""]["waiting"])
        assert max(waiting.values()) - min(waiting.values()) <= 1


def test_a_loader_resumed_between_steps_continues_with_the_same_refills():
    def steps(loader, count):
        for number in range(count):
            step = loader.next_step()
            yield step + loader.more(number % 3, step)

    whole = Loader([10], 4, seed=5)
    list(steps(whole, 9))
    other = Loader([10], 4, seed=5)
    other.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    assert list(steps(other, 9)) == list(steps(whole, 9))


# Several sets.

SIZES, WEIGHTS = (30, 9, 100), {"text": 2.0, "one_image": 1.0, "several": 1.0}


def mixture(per_step=8, seed=3, weights=WEIGHTS, sizes=SIZES, shuffle=True):
    shares = {name: weight / sum(weights.values()) for name, weight in weights.items()}
    return Loader(sizes, per_step, seed, shuffle, shares)


def by_set(step, sizes=SIZES):
    """How many indices of a step are of each set."""
    ends = list(itertools.accumulate(sizes))
    found = Counter(bisect.bisect_right(ends, index) for index in step)
    return [found[number] for number in range(len(sizes))]


def test_every_step_has_the_sets_in_proportion_to_their_weights():
    assert all(by_set(step) == [4, 2, 2] for step in draw(mixture(), 100))
    drawn = [0, 0, 0]
    for number, step in enumerate(draw(mixture(per_step=7, weights={"a": 3, "b": 1, "c": 5}), 200)):
        drawn = [old + new for old, new in zip(drawn, by_set(step), strict=True)]
        for share, count in zip((3, 1, 5), drawn, strict=True):
            assert abs(7 * (number + 1) * share / 9 - count) < 1


@pytest.mark.parametrize("shuffle", [True, False])
def test_each_set_has_epochs_of_its_own(shuffle):
    loader, counts = mixture(shuffle=shuffle), Counter(range(sum(SIZES)))
    for number in range(150):
        step = loader.next_step()
        step += loader.more(number % 5, step)
        assert len(set(step)) == len(step)
        counts.update(step)
    cursors = list(loader.state_dict()["cursors"].values())
    first = 0
    for size, cursor in zip(SIZES, cursors, strict=True):
        seen = [counts[index] - 1 for index in range(first, first + size)]
        seen = [n + cursor["waiting"].count(first + i) for i, n in enumerate(seen)]
        assert set(seen) <= {cursor["epoch"], cursor["epoch"] + 1}
        assert sum(seen) == cursor["epoch"] * size + cursor["position"]
        first += size
    assert cursors[1]["epoch"] > cursors[0]["epoch"] > cursors[2]["epoch"] > 1


def test_a_set_without_further_samples_for_a_step_is_passed_over_and_catches_up():
    loader = mixture()
    step = loader.next_step()
    step += loader.more(50, step)
    assert by_set(step) == [30, 9, 19] and len(set(step)) == 58  # of 29, 14.5, 14.5
    step += loader.more(1000, step)
    assert sorted(step) == list(range(139)) and loader.more(1, step) == []
    later = by_set(step + sum(draw(loader, 60), []))
    assert sum(later) == 619 and later == pytest.approx([619 / 2, 619 / 4, 619 / 4], abs=1)
    assert by_set(loader.next_step()) == [4, 2, 2]


@pytest.mark.parametrize("stop", [0, 1, 4, 11])
def test_a_resumed_mixture_draws_the_same(stop):
    def steps(loader, count):
        for number in range(count):
            step = loader.next_step()
            yield step + loader.more(number % 3, step)

    first, whole = mixture(per_step=11), mixture(per_step=11)
    list(steps(first, stop))
    list(steps(whole, stop))
    second = mixture(per_step=11)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert list(steps(second, 20)) == list(steps(whole, 20))


def test_the_seed_and_the_place_of_a_set_decide_its_order():
    assert draw(mixture(), 20) == draw(mixture(), 20) != draw(mixture(seed=4), 20)
    same = mixture(10, 3, {"a": 1, "b": 1}, (50, 50))
    first, second = ([i % 50 for s in draw(same, 10) for i in s if i // 50 == n] for n in (0, 1))
    assert sorted(first) == sorted(second) and first != second


def test_every_second_prompt_of_a_step_is_not_always_of_the_same_set():
    """Of which a replica takes the first, another the second."""
    halves = [
        by_set(step[::2], (50, 50)) for step in draw(mixture(8, 3, {"a": 1, "b": 1}, (50, 50)), 20)
    ]
    assert len({tuple(half) for half in halves}) > 2


def test_a_single_set_has_the_order_and_the_cursor_of_earlier_checkpoints():
    orders = [np.random.default_rng([3, epoch]).permutation(12).tolist() for epoch in range(2)]
    assert sum(draw(Loader([12], 4, seed=3), 6), []) == sum(orders, [])
    saved = {
        "num_samples": 12,
        "seed": 3,
        "shuffle": True,
        "epoch": 1,
        "position": 5,
        "waiting": [orders[1][0]],
    }
    loader = Loader([12], 4, seed=3)
    loader.load_state_dict(saved)
    assert loader.next_step() == [orders[1][0], *orders[1][5:8]]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"weights": {**WEIGHTS, "text": 3.0}}, "mixture={'text': [30, 0.5]"),
        ({"weights": {"words": 2.0, "one_image": 1.0, "several": 1.0}}, "'words': [30, 0.5]"),
        ({"sizes": (9, 30, 100)}, "'text': [9, 0.5]"),
        ({"sizes": (30, 9, 101)}, "num_samples=139, this run has 140"),
    ],
)
def test_a_cursor_of_another_mixture_is_refused(change, said):
    state = mixture().state_dict()
    with pytest.raises(DataError) as error:
        mixture(**change).load_state_dict(state)
    assert said in str(error.value)
    single = {"num_samples": 139, "seed": 3, "shuffle": True, "epoch": 0, "position": 0}
    with pytest.raises(DataError, match="mixture="):
        mixture().load_state_dict({**single, "waiting": []})
