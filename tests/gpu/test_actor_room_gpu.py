"""The optimizer's state and frozen weights leave the GPU and come back unchanged."""

import pytest
import torch

pytestmark = pytest.mark.gpu


def test_gradients_and_state_leave_the_gpu_and_training_goes_on_as_if_they_had_stayed(tiny_model):
    from megatron_sr1.config.run import ParallelConfig
    from megatron_sr1.runtime.device import select_device, start_distributed
    from megatron_sr1.runtime.groups import make_groups
    from megatron_sr1.trainer.sft import token_loss
    from megatron_sr1.trainer.step import update
    from tests.checkpoint_run import make_run, text_row

    device = select_device("cuda")
    start_distributed(device)
    groups = make_groups(ParallelConfig(), device)
    found = []
    for what in ("none", "optimizer"):
        actor = make_run(tiny_model, groups, "bfloat16")
        losses = [update(actor, [text_row()], token_loss, 1.0)["loss"]]
        for _ in range(2):
            before = torch.cuda.memory_allocated()
            actor.offload(what)
            # Float32 sums of gradients, master weights and two moments: 16 bytes a parameter.
            num_parameters = sum(p.numel() for p in actor.chunks[0].parameters())
            freed = before - torch.cuda.memory_allocated()
            assert freed == 0 if what == "none" else freed > 15 * num_parameters
            losses.append(update(actor, [text_row()], token_loss, 1.0)["loss"])
            assert torch.cuda.memory_allocated() >= before
        weights = torch.cat([p.detach().flatten() for p in actor.chunks[0].parameters()])
        found.append((losses, weights))
    assert found[0][0] == found[1][0] and torch.equal(found[0][1], found[1][1])


def test_untrained_weights_leave_the_gpu_and_training_goes_on_as_if_they_had_stayed(tiny_model):
    from megatron_sr1.config.run import ParallelConfig
    from megatron_sr1.runtime.device import select_device, start_distributed
    from megatron_sr1.runtime.groups import make_groups
    from megatron_sr1.trainer.sft import token_loss
    from megatron_sr1.trainer.step import update
    from tests.checkpoint_run import make_run, text_row

    device = select_device("cuda")
    start_distributed(device)
    groups = make_groups(ParallelConfig(), device)
    found = []
    for what in ("none", "weights"):
        actor = make_run(tiny_model, groups, "bfloat16", ["adapter.rank=4"])
        base = [p for p in actor.chunks[0].parameters() if not p.requires_grad]
        losses = [update(actor, [text_row()], token_loss, 1.0)["loss"]]
        for _ in range(2):
            before = torch.cuda.memory_allocated()
            actor.offload(what)
            freed = before - torch.cuda.memory_allocated()
            assert freed == 0 if what == "none" else freed >= sum(p.nbytes for p in base)
            sent = {name: tensor.cpu() for name, tensor in actor.weights()}
            losses.append(update(actor, [text_row()], token_loss, 1.0)["loss"])
            assert all(p.is_cuda for p in base)
        found.append((losses, sent))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(tensor, found[1][1][name]) for name, tensor in found[0][1].items())
