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
    with caplog.at_level(logging.WARNING):
        for key in "ab":
            context.skip(DataError(f"s.tar sample {key}: no image"))
    context.count_skipped(is_replica_leader=True)
    assert context.skipped == 2
    assert [r.getMessage() for r in caplog.records] == [
        f"skipped: s.tar sample {key}: no image" for key in "ab"
    ]
    context.skip(DataError("s.tar sample c: no image"))
    context.count_skipped(is_replica_leader=False)  # another rank, with the same samples, counts it
    context.count_skipped(is_replica_leader=True)
    assert context.skipped == 2
    for key in "de":
        context.skip(DataError(f"s.tar sample {key}: no image"))
    with pytest.raises(DataError, match=r"4 samples skipped, at most 3 \(data.max_skipped\)"):
        context.count_skipped(is_replica_leader=True)
