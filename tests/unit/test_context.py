"""Bad samples are named and counted; one too many stops the run."""

import logging

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
    assert context.skipped == 2
    assert [r.getMessage() for r in caplog.records] == [
        f"skipped: s.tar sample {index}: no image" for index in (10, 11)
    ]
    # Another rank, with the same samples, counts them.
    assert context.read_usable(read, [12, 3], False) == ["3"]
    assert context.skipped == 2
    with pytest.raises(DataError, match=r"4 samples skipped, at most 3 \(data.max_skipped\)"):
        context.read_usable(read, [13, 14], True)
