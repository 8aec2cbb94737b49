"""Megatron's CPU mode is entered around its schedules, and left for the work of a micro-batch."""

import torch

from megatron_sr1.config.loading import load_config
from megatron_sr1.data.processor import Processor
from megatron_sr1.trainer.actor import load_actor_model, make_actor
from megatron_sr1.trainer.sft import token_loss
from megatron_sr1.trainer.step import update
from tests.layouts import pack_rows, random_samples


def test_forward_and_backward_of_micro_batches_run_outside_of_the_mode(tiny_model, groups):
    config = load_config(None, [f"model.path={tiny_model}", "model.dtype=float32"])
    actor = make_actor(config, *load_actor_model(config, groups), groups, num_updates=1)
    processor = Processor(tiny_model)
    rows = pack_rows(*random_samples(processor, [[(56, 28)], []], [20, 20]), processor, groups, 0)
    is_outside = []

    def loss(policy_logprobs, batch):
        def record(*_):
            is_outside.append(torch._C._is_torch_function_all_disabled())

        record()
        policy_logprobs.register_hook(record)
        return token_loss(policy_logprobs, batch)

    update(actor, rows, loss, temperature=1.0)
    assert is_outside == [True] * 4
