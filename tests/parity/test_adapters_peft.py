"""Adapters compute what PEFT's do on transformers' model: logits, loss, gradients, updates, merge.

tests/distributed/test_adapter_layouts.py compares the layouts with one process.
"""

import json

import pytest
import torch

from megatron_sr1.checkpoint.adapters import (
    attach_adapters,
    export_adapters,
    load_adapter_tensors,
    local_adapters,
)
from megatron_sr1.checkpoint.hf import export_weights, load_hf
from megatron_sr1.checkpoint.mapping import canonical_hf_name
from megatron_sr1.config.loading import load_config
from megatron_sr1.config.run import ModelConfig, ParallelConfig
from megatron_sr1.model.hf_config import read_hf_config
from megatron_sr1.model.qwen25_vl import build_model
from megatron_sr1.records import PackedBatch
from megatron_sr1.runtime import cpu
from megatron_sr1.trainer.actor import add_adapters, load_actor_model, make_actor
from megatron_sr1.trainer.step import update
from tests.adapter_cases import logits_of, published, reference_logprobs, write_adapted
from tests.model_cases import make_row, worst_relative_gap

TOLERANCE = 1e-5


def build(directory, groups, settings, tensors, **model):
    hf_config = read_hf_config(directory)
    settings_of_model = ModelConfig(dtype="float32", **model)
    chunks = build_model(hf_config, groups, settings_of_model, ParallelConfig())
    load_hf(chunks, directory, hf_config, groups)
    attach_adapters(chunks, hf_config, groups, settings, seed=1)
    load_adapter_tensors(chunks, groups, tensors)
    return chunks, hf_config


def gradients_of(chunks):
    """Of one process: A's and B's under published names; the rows are in the layer's order."""
    from megatron_sr1.checkpoint.transforms import publish

    return {
        name: value
        for entry, parameter in local_adapters(chunks)
        for name, value in publish(entry, [parameter.grad])
    }


@pytest.mark.parametrize("seed", range(12))
def test_logits_loss_and_gradients_equal_pefts(seed, tmp_path, groups):
    peft, rows, settings, tensors = write_adapted(tmp_path, seed)
    chunks, _ = build(tmp_path, groups, settings, tensors)
    samples = rows[2] if seed % 2 else rows[0]
    row = make_row(samples)
    with cpu.megatron_mode():
        logprobs = chunks[0](**row.inputs, labels=row.labels, temperature=0.7)
        loss = -(logprobs * row.loss_mask).sum() / row.loss_mask.sum()
        loss.backward()
    expected = -(reference_logprobs(peft, samples, 0.7) * row.loss_mask).sum()
    expected = expected / row.loss_mask.sum()
    expected.backward()
    assert abs(loss.item() - expected.item()) < TOLERANCE * expected.item()
    wanted = {published(n): p.grad for n, p in peft.named_parameters() if p.requires_grad}
    assert all(grad.abs().max() > 0 for grad in wanted.values())
    gap, name = worst_relative_gap(gradients_of(chunks), wanted)
    assert gap < TOLERANCE, name
    assert all(p.grad is None for p in chunks[0].parameters() if not p.requires_grad)
    base = [s.logits for s in samples]
    with torch.no_grad(), cpu.megatron_mode():
        logits = chunks[0](**row.inputs)[0]
        with chunks[0].adapters.switched_off():
            off = chunks[0](**row.inputs)[0]
    with torch.no_grad():
        adapted = logits_of(peft, samples)
    assert (logits - adapted).abs().max() < TOLERANCE
    assert (adapted - torch.cat(base)).abs().max() > 1e-2
    assert (off - torch.cat(base)).abs().max() < TOLERANCE


@pytest.mark.parametrize("seed", range(4))
def test_merged_weights_equal_pefts_bitwise_and_tensors_come_back_as_they_went(
    seed, tmp_path, groups
):
    peft, _, settings, tensors = write_adapted(tmp_path, seed)
    chunks, hf_config = build(tmp_path, groups, settings, tensors)
    given = dict(export_adapters(chunks, groups))
    assert given.keys() == tensors.keys()
    assert all(torch.equal(given[name], tensors[name]) for name in given)
    merged = peft.merge_and_unload().state_dict()
    wanted = {canonical_hf_name(name): value for name, value in merged.items()}
    found = dict(export_weights(chunks, hf_config, groups))
    for name, value in found.items():
        assert torch.equal(value, wanted[name]), name


@pytest.mark.parametrize("seed", [0, 3, 6])
def test_two_updates_equal_adamw_of_torch_on_pefts(seed, tmp_path, groups):
    peft, rows, settings, tensors = write_adapted(tmp_path, seed)
    keys = {f"adapter.{name}": getattr(settings, name) for name in ("rank", "alpha", "scaling")}
    keys |= {"model.path": tmp_path, "model.dtype": "float32", "optimizer.learning_rate": 1e-3}
    keys |= {"adapter.targets": json.dumps(settings.targets), "optimizer.weight_decay": 0.1}
    keys["optimizer.epsilon"] = 1e-6  # some gradients are zero but for rounding
    config = load_config(None, [f"{key}={value}" for key, value in keys.items()])
    chunks, hf_config, source = load_actor_model(config, groups)
    add_adapters(config, chunks, hf_config, groups)
    load_adapter_tensors(chunks, groups, tensors)
    actor = make_actor(config, chunks, hf_config, source, groups, num_updates=10)
    adamw = torch.optim.AdamW(
        [p for p in peft.parameters() if p.requires_grad],
        lr=1e-3,
        betas=(config.optimizer.beta1, config.optimizer.beta2),
        eps=config.optimizer.epsilon,
        weight_decay=0.1,
    )
    for samples in (rows[0], rows[2]):
        row = make_row(samples)
        norm = update(actor, [packed(row)], mean_loss, temperature=1.0)["grad_norm"]
        adamw.zero_grad()
        logprobs = reference_logprobs(peft, samples, 1.0)
        (-(logprobs * row.loss_mask).sum() / row.loss_mask.sum()).backward()
        expected = torch.nn.utils.clip_grad_norm_(peft.parameters(), config.optimizer.clip_grad)
        adamw.step()
        assert norm == pytest.approx(float(expected), rel=TOLERANCE)
    moved, found = 0.0, dict(actor.adapter_tensors())
    for name, parameter in peft.named_parameters():
        if parameter.requires_grad:
            moved = max(moved, float((parameter - tensors[published(name)]).abs().max()))
            assert (found[published(name)] - parameter).abs().max() < TOLERANCE, name
    assert moved > 1e-3


def packed(row):
    return PackedBatch(sample_ids=(), **row.inputs, labels=row.labels, loss_mask=row.loss_mask)


def mean_loss(logprobs, batch, non_loss_data=False):
    total, count = -(logprobs * batch.loss_mask).sum(), batch.loss_mask.sum()
    return total, count.int(), {"loss": (total.detach(), count)}
