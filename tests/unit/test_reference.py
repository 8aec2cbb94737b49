"""The reference's weights take the live ones' place, without a copy of either on a CPU.

tests/distributed/test_updates.py tests on ranks that its logprobs are those before training,
tests/gpu its page-locked memory.
"""

import pytest
import torch

from megatron_sr1.trainer.actor import Reference
from tests.checkpoint_run import fill, held, make_run


def places(actor):
    return [p.data_ptr() for chunk in actor.chunks for p in chunk.parameters()]


def test_the_live_weights_stay_where_they_are_and_come_back_after_an_error(tiny_model, groups):
    actor = make_run(tiny_model, groups)
    fill(actor, 2.0)
    reference = Reference(actor.chunks)
    fill(actor, 3.0)
    live = places(actor)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), reference.in_place():
            assert held(actor) == 2.0
            assert set(places(actor)) == {frozen.data_ptr() for frozen in reference._frozen}
            raise ZeroDivisionError
        assert held(actor) == 3.0 and places(actor) == live
    fill(actor, 4.0)  # of the buffer that data parallelism gathers into
    assert held(actor) == 4.0
    buffers = [buffer for wrapped in actor.wrapped for buffer in wrapped.buffers]
    assert all(float(buffer.param_data.max()) == 4.0 for buffer in buffers)


def test_the_copy_is_of_its_own(tiny_model, groups):
    actor = make_run(tiny_model, groups)
    reference = Reference(actor.chunks)
    before = [p.clone() for p in actor.chunks[0].parameters()]
    fill(actor, 3.0)
    with reference.in_place():
        found = [p.clone() for p in actor.chunks[0].parameters()]
    assert all(map(torch.equal, found, before))
