"""A small model that tests save and resume, in this process."""

import torch

from megatron_sr1.checkpoint.folders import resolve_model
from megatron_sr1.checkpoint.loading import load_checkpoint, load_model
from megatron_sr1.checkpoint.saving import SaveQueue
from megatron_sr1.config.loading import load_config
from megatron_sr1.config.training import CheckpointConfig
from megatron_sr1.model.hf_config import read_hf_config
from megatron_sr1.model.qwen25_vl import build_model
from megatron_sr1.records import PackedBatch
from megatron_sr1.runtime import cpu
from megatron_sr1.trainer.actor import add_adapters, make_actor


def make_run(directory, groups, dtype="float32", keys=()):
    """An actor with its optimizer, from a model directory, with adapters if the keys say so."""
    config = load_config(None, [f"model.path={directory}", f"model.dtype={dtype}", *keys])
    source = resolve_model(directory)
    hf_config = read_hf_config(source.hf_files)
    with cpu.megatron_mode():
        chunks = build_model(hf_config, groups, config.model, config.parallel)
        load_model(chunks, source, hf_config, groups, verify=True)
    add_adapters(config, chunks, hf_config, groups)
    return make_actor(config, chunks, hf_config, source, groups, num_updates=10)


def text_row(num_tokens=16):
    """A micro-batch of one sequence without images, all of it target."""
    ids = torch.arange(10, 10 + num_tokens)[None]
    return PackedBatch(
        sample_ids=(0,),
        input_ids=ids,
        labels=ids + 1,
        loss_mask=torch.ones(1, num_tokens),
        position_ids=torch.arange(num_tokens).expand(3, 1, -1),
        cu_seqlens=torch.tensor([0, num_tokens], dtype=torch.int32),
        vision=None,
    )


@torch.no_grad()
def fill(actor, value):
    """Give all weights one value, master weights included."""
    for chunk in actor.chunks:
        for parameter in chunk.parameters():
            parameter.fill_(value)
    actor.optimizer.reload_model_params()


def held(actor):
    """The one value of all weights."""
    values = {float(p.detach().unique()) for chunk in actor.chunks for p in chunk.parameters()}
    assert len(values) == 1, values
    return values.pop()


def save(actor, groups, folder, step, source=None, keep_last=0):
    """Save a step whose state is {"n": step}."""
    queue = SaveQueue(folder, CheckpointConfig(keep_last=keep_last))
    queue.add(step, actor.trained, {"n": step}, source)
    return folder / f"step_{step}"


def load(actor, groups, folder, **more):
    """Load the latest step; returns its state."""
    return load_checkpoint(folder, actor.trained, **more)
