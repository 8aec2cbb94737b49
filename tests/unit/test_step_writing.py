"""What a step writes while the actor learns: in a thread, there after the block."""

import threading

import pytest

from megatron_sr1.config.loading import load_config
from megatron_sr1.trainer.context import Context


@pytest.fixture
def config():
    return load_config(None, ["model.path=x", "data.train=x"])


def test_the_writer_writes_beside_the_block_and_returns_its_values_after_it(config, groups):
    began = threading.Event()

    def write():
        began.set()
        return {"a": 1.0}

    with Context(config, groups, 8).writing(write) as found:
        assert began.wait(60)  # within the block
    assert found == {"a": 1.0}


def test_a_failure_of_the_writer_ends_the_step(config, groups):
    with pytest.raises(ZeroDivisionError), Context(config, groups, 8).writing(lambda: 1 / 0):
        pass
