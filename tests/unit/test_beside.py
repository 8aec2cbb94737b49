"""What a step does beside the actor: in a thread, whose failure ends the step."""

import threading
from dataclasses import replace

import pytest

from megatron_sr1.config.loading import load_config
from megatron_sr1.trainer.context import Context
from megatron_sr1.trainer.grading import Graded
from megatron_sr1.trainer.objective import Credit
from megatron_sr1.trainer.recording import record


@pytest.fixture
def context(groups):
    return Context(load_config(None, ["model.path=x", "data.train=x"]), groups, 8)


def test_work_goes_on_beside_the_block_and_has_a_result(context):
    began = threading.Event()

    def work():
        began.set()
        return {"a": 1.0}

    with context.beside(work) as later:
        assert began.wait(60)  # within the block
        assert later.result() == {"a": 1.0}


def test_a_failure_of_the_work_is_raised_with_its_result(context):
    with pytest.raises(ZeroDivisionError), context.beside(lambda: 1 / 0) as later:
        later.result()


def test_ranks_that_do_not_write_send_their_rollouts_and_have_no_metrics(context, groups):
    context.groups = replace(groups, world=replace(groups.world, rank=1))
    nothing = Graded([], [], Credit([]), {})
    assert record(context, None, nothing) == {}
