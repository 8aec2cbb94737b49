"""Passes under FP8 whose ranks have different numbers of rows; see test_te_double.py.

Run as `te_fp8_rows.py MODEL_DIR` on two ranks with the double on the path, which communicates where
the real layers do and refuses the rows that they refuse.
"""

import sys
from dataclasses import replace

import torch
import transformer_engine.pytorch.fp8 as te

from megatron_sr1.checkpoint.hf import load_hf
from megatron_sr1.config.run import ModelConfig, ParallelConfig
from megatron_sr1.model import layers, qwen25_vl
from megatron_sr1.model.hf_config import read_hf_config
from megatron_sr1.model.transformer_config import row_multiple
from megatron_sr1.runtime import cpu
from megatron_sr1.runtime.device import select_device, start_distributed, stop_distributed
from megatron_sr1.runtime.groups import make_groups
from megatron_sr1.trainer.actor import Actor
from megatron_sr1.trainer.step import _schedule, empty_row, sample_logprobs
from tests.layouts import destroy_groups


def loss(policy_logprobs, batch):
    return policy_logprobs.sum(), batch.loss_mask.sum().int(), {}


def make(directory, parallel, recompute="none"):
    """An actor with delayed scaling in all layers, without data parallelism and an optimizer."""
    hf_config = read_hf_config(directory)
    model = ModelConfig(
        dtype="float32",
        spec="transformer_engine",
        fp8="hybrid",
        fp8_recipe="delayed",
        recompute=recompute,
    )
    groups = make_groups(parallel, select_device("cpu"))
    chunks = qwen25_vl.build_model(hf_config, groups, model, parallel)
    load_hf(chunks, directory, hf_config, groups)
    return Actor(chunks, chunks, None, None, hf_config, None, groups, row_multiple(model, parallel))


def train(actor, num_rows):
    """Pass forward and backward over rows as short as they may be."""
    row = empty_row(actor.row_multiple)
    rows = [replace(row, loss_mask=torch.ones_like(row.loss_mask))] * num_rows
    with cpu.megatron_mode():
        _schedule(actor, actor.wrapped, rows, 1.0, loss)()
    return rows


def different_numbers_of_rows(directory):
    """Two data-parallel ranks: maxima over both would be waited for in vain."""
    actor = make(directory, ParallelConfig())
    rank = actor.groups.world.rank
    te.GROUPS.clear()
    train(actor, 1 + rank)
    # One for each row and pass: over this rank alone.
    assert te.GROUPS == [(rank,)] * 2 * (1 + rank), te.GROUPS
    destroy_groups()


def maxima_over_tensor_parallel_ranks(directory):
    actor = make(directory, ParallelConfig(tensor=2))
    te.GROUPS.clear()
    train(actor, 1)
    assert te.GROUPS == [(0, 1)] * 2, te.GROUPS
    destroy_groups()


def filled_up_rows(directory):
    """Two virtual stages on each of two ranks take two rows; the second is padding."""
    train(make(directory, ParallelConfig(pipeline=2, virtual=2)), 1)
    destroy_groups()


def no_kept_scales(directory):
    """A pass without gradients keeps no scales, which the backward pass after it would take."""
    actor = make(directory, ParallelConfig(), recompute="full")
    rows = train(actor, 1)
    assert not te.KEPT, "not all were recomputed"
    sample_logprobs(actor, [], rows, 1.0)
    assert not te.KEPT, f"{len(te.KEPT)} kept"
    assert all(chunk.training for chunk in actor.chunks)
    train(actor, 1)
    assert not te.KEPT
    destroy_groups()


def main():
    start_distributed(select_device("cpu"), 60)
    layers.require_transformer_engine = lambda: None  # it asks for CUDA
    for case in (
        different_numbers_of_rows,
        maxima_over_tensor_parallel_ranks,
        filled_up_rows,
        no_kept_scales,
    ):
        case(sys.argv[1])
        print(f"PASSED {case.__name__}", flush=True)
    stop_distributed()


if __name__ == "__main__":
    main()
