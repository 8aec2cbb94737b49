"""An update in which every token is masked is none; over several ranks: test_updates.py.

Sources: unslothai/unsloth-zoo#1286, huggingface/trl#6369, NVIDIA-NeMo/RL#166.
"""

import logging
from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_sr1.config.loading import load_config
from megatron_sr1.config.rollout import RolloutConfig
from megatron_sr1.config.training import AlgorithmConfig
from megatron_sr1.data.packing import pack_samples
from megatron_sr1.records import TrainSample
from megatron_sr1.trainer.actor import load_actor_model, make_actor
from megatron_sr1.trainer.objective import grpo_loss
from megatron_sr1.trainer.sft import token_loss
from megatron_sr1.trainer.step import named, update

pytestmark = pytest.mark.field
SETTINGS = ["model.dtype=float32", "optimizer.learning_rate=1e-2", "optimizer.weight_decay=0.1"]


def make_samples():
    """Three text-only sequences; the engine's logprobs are 0.5 nats off the old ones."""
    rng = np.random.default_rng(5)
    for index in range(3):
        ids = rng.integers(10, 300, size=12 + index)
        old = -6 + 0.1 * rng.standard_normal(len(ids)).astype(np.float32)
        yield TrainSample(
            index=index,
            num_images=0,
            token_ids=ids,
            loss_mask=np.arange(len(ids)) >= 6,
            image_grid_thw=(),
            advantages=np.full(len(ids), index - 1.0, np.float32),
            old_logprobs=old,
            engine_logprobs=old - 0.5,
            reference_logprobs=old,
        )


def packed(samples):
    return pack_samples(list(samples), 64, None, image_pad_id=0, merge_size=2)


def state_of(actor):
    """Weights, the optimizer's moments, and the place in the schedule."""
    weights = {name: tensor.clone() for name, tensor in actor.weights()}
    moments = [
        value.clone()
        for part in actor.optimizer.chained_optimizers
        for state in part.optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    ]
    return weights, moments, actor.scheduler.num_steps, actor.optimizer.param_groups[0]["lr"]


def assert_same(one, other):
    assert all(torch.equal(one[0][name], other[0][name]) for name in one[0])
    assert len(one[1]) == len(other[1]) and all(map(torch.equal, one[1], other[1]))
    assert one[2:] == other[2:]


def test_an_update_without_a_token_in_the_loss_leaves_everything_as_it_is(
    tiny_model, groups, caplog
):
    config = load_config(None, [f"model.path={tiny_model}", *SETTINGS])
    chunks, hf_config, source = load_actor_model(config, groups)
    actor = make_actor(config, chunks, hf_config, source, groups, num_updates=4)
    batches = packed(make_samples())

    def learn(bound):
        algorithm = AlgorithmConfig(mask_beyond_nats=bound, importance_sampling="token")
        return update(actor, batches, grpo_loss(algorithm, RolloutConfig()), 1.0)

    first = learn(0.0)
    before = state_of(actor)
    assert len(before[1]) > 50 and any(m.abs().max() > 0 for m in before[1])
    with caplog.at_level(logging.WARNING):
        skipped = learn(0.1)
    assert_same(state_of(actor), before)
    assert "update skipped: none of its 21 target tokens is in the loss" in caplog.text
    assert skipped["skipped_updates"] == 1 and skipped["learning_rate"] == before[3]
    assert skipped["mismatch/masked_share"] == 1 and skipped["mismatch/num_masked_sequences"] == 3
    absent = first.keys() - skipped.keys()
    assert absent >= {"loss", "grad_norm", "reference_kl", "clipped_share", "importance/weight"}
    assert all(np.isfinite(value) for value in skipped.values())

    # Supervised fine-tuning, of a step of which no rank has a target.
    nothing = [replace(s, loss_mask=np.zeros_like(s.loss_mask)) for s in make_samples()]
    assert update(actor, packed(nothing), token_loss, 1.0)["skipped_updates"] == 1
    assert_same(state_of(actor), before)

    again = learn(0.0)
    assert again["skipped_updates"] == 0 and again.keys() == first.keys()
    assert state_of(actor)[2] == before[2] + 1
    assert any(not torch.equal(w, before[0][n]) for n, w in state_of(actor)[0].items())

    step = named([first, skipped, again])
    assert step["actor/skipped_updates"] == 1
    assert step["actor/loss"] == pytest.approx((first["loss"] + again["loss"]) / 2)
    assert "actor/loss" not in named([skipped]) and named([skipped])["actor/skipped_updates"] == 1
