"""What the actor leaves to the engine: memory that is really free, and the same training after it.

Not covered: the optimizer's state, which moves on a GPU alone (tests/gpu/test_actor_room_gpu.py).
"""

import pytest
import torch

from megatron_sr1.config.loading import load_config
from megatron_sr1.errors import ConfigError
from megatron_sr1.trainer.sft import token_loss
from megatron_sr1.trainer.step import update
from tests.checkpoint_run import make_run, text_row


def gradient_bytes(actor):
    buffers = [buffer for wrapped in actor.wrapped for buffer in wrapped.buffers]
    return sum(buffer.grad_data.untyped_storage().nbytes() for buffer in buffers)


def test_gradients_are_freed_and_training_goes_on_as_if_they_had_stayed(tiny_model, groups):
    found = []
    for what in ("none", "gradients", "optimizer"):
        actor = make_run(tiny_model, groups)
        held = gradient_bytes(actor)
        losses = []
        for _ in range(3):
            actor.offload(what)
            actor.offload(what)  # an evaluation may come between
            assert gradient_bytes(actor) == (held if what == "none" else 0) and held > 0
            losses.append(update(actor, [text_row()], token_loss, 1.0)["loss"])
            assert gradient_bytes(actor) == held
        weights = torch.cat([p.detach().flatten() for p in actor.chunks[0].parameters()])
        found.append((losses, weights))
    assert found[0][0][2] < found[0][0][0]
    for losses, weights in found[1:]:
        assert losses == found[0][0] and torch.equal(weights, found[0][1])


@pytest.mark.parametrize("state", ["bfloat16", "offload", "float32 weights"])
def test_state_that_is_not_float32_beside_bfloat16_weights_does_not_move(state):
    settings = {
        "bfloat16": ["optimizer.state=bfloat16", "optimizer.beta2=0.99"],
        "offload": ["optimizer.offload=true"],
        "float32 weights": ["model.dtype=float32"],
    }[state]
    keys = ["model.path=m", "stage=grpo", "model.dtype=bfloat16", "rollout.make_room=optimizer"]
    load_config(None, keys)
    with pytest.raises(ConfigError, match="rollout.make_room=optimizer with model.dtype"):
        load_config(None, [*keys, *settings])
