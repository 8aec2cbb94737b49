"""Bad samples are named and counted up to a limit; steps of a run, and garbage between them."""

import gc
import logging
import weakref

import pytest

from megatron_sr1.config.loading import load_config
from megatron_sr1.errors import DataError
from megatron_sr1.trainer.context import Context


def test_bad_samples_are_named_and_counted_up_to_the_limit(groups, tmp_path, caplog):
    config = load_config(
        None, ["model.path=x", "data.train=x", "data.max_skipped=3", f"output={tmp_path}"]
    )
    context = Context(config, groups, 0)

    def read(index):
        if index > 9:
            raise DataError(f"s.tar sample {index}: no image")
        return str(index)

    with caplog.at_level(logging.WARNING):
        assert context.read_usable(read, [1, 10, 2, 11], True) == ["1", "2"]
    assert context.skipped == 0
    context.count_skipped()
    assert context.skipped == 2
    assert [r.getMessage() for r in caplog.records] == [
        f"skipped: s.tar sample {index}: no image" for index in (10, 11)
    ]
    # Another rank, with the same samples, counts them.
    assert context.read_usable(read, [12, 3], False) == ["3"]
    context.count_skipped()
    assert context.skipped == 2
    context.read_usable(read, [13, 14], True)
    with pytest.raises(DataError, match=r"4 samples skipped, at most 3 \(data.max_skipped\)"):
        context.count_skipped()


class Cycle:
    """An object that only garbage collection frees."""

    def __init__(self):
        self.itself = self


def test_garbage_is_collected_between_steps_alone(groups, tmp_path):
    paths = ["model.path=x", "data.train=x", "optimizer.num_steps=2", f"output={tmp_path}"]
    context, steps = Context(load_config(None, paths), groups, 0), 0
    for _ in context.steps():
        steps += 1
        left = weakref.ref(Cycle())
        assert not gc.isenabled() and len([Cycle() for _ in range(10_000)]) and left()
        context.step += 1
    assert steps == 2 and gc.isenabled() and not gc.get_freeze_count()
    gc.collect()
    assert left() is None
