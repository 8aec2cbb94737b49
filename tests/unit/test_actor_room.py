"""What the actor leaves to the engine: memory that is really free, and the same training after it.

Not covered: memory of weights and of the optimizer's state, which move on a GPU alone
(tests/gpu/test_actor_room_gpu.py).
"""

import pytest
import torch

from megatron_sr1.config.loading import load_config
from megatron_sr1.errors import ConfigError
from megatron_sr1.runtime import host_memory
from megatron_sr1.trainer.sft import token_loss
from megatron_sr1.trainer.step import row_logprobs, update
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


ADAPTERS = ["adapter.rank=4", "optimizer.learning_rate=1e-2"]


def test_weights_that_are_not_trained_come_back_and_can_be_read_meanwhile(
    tiny_model, groups, monkeypatch
):
    """Copied as on a GPU, where a CPU would move nothing."""
    made = []

    def copies(tensors):
        made.extend(tensor.detach().clone() for tensor in tensors)
        return made

    monkeypatch.setattr(host_memory, "host_copies", copies)
    found = []
    for what in ("none", "weights"):
        actor = make_run(tiny_model, groups, keys=ADAPTERS)
        base = [p for p in actor.chunks[0].parameters() if not p.requires_grad]
        assert 0 < sum(p.requires_grad for p in actor.chunks[0].parameters()) < len(base)
        if what == "weights":
            actor.untrained.has_copies = True
        losses, sent = [], []
        for _ in range(3):
            actor.offload(what)
            actor.offload(what)
            sent.append({name: tensor.clone() for name, tensor in actor.weights()})
            if what == "weights":
                assert {p.data_ptr() for p in base} == {copy.data_ptr() for copy in made}
                with pytest.raises(AssertionError, match="restore them first"):
                    row_logprobs(actor, [text_row()], 1.0)
                actor.restore_weights()
                row_logprobs(actor, [text_row()], 1.0)
                assert gradient_bytes(actor) == 0  # a reference's pass needs none
                assert {p.data_ptr() for p in base}.isdisjoint(copy.data_ptr() for copy in made)
            losses.append(update(actor, [text_row()], token_loss, 1.0)["loss"])
            assert gradient_bytes(actor) > 0
        found.append((losses, sent))
    (losses, sent), (moved_losses, moved_sent) = found
    assert losses == moved_losses and losses[2] < losses[0]
    for one, other in zip(sent, moved_sent, strict=True):
        assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert any(not torch.equal(tensor, sent[2][name]) for name, tensor in sent[0].items())
    assert len(made) == len(base)  # one copy of each


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        (["adapter.rank=0"], "about weights that are not trained"),
        (["rollout.sleep_level=0"], "rollout.sleep_level=0 holds weights of engine and actor"),
        (["rollout.canary_bound=1e-3"], "rollout.canary_bound=0.001 holds weights"),
    ],
)
def test_settings_that_hold_both_models_on_the_gpu_are_refused(keys, named):
    base = ["model.path=m", "stage=grpo", "rollout.make_room=weights"]
    load_config(None, [*base, "adapter.rank=8"])
    load_config(None, [*base, "model.freeze=[^visual]"])
    with pytest.raises(ConfigError, match=named):
        load_config(None, [*base, "adapter.rank=8", *keys])


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
