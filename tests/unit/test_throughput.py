"""Throughput by phase, with operations counted by hand.

The model (tests/planned_models.py): 4 text layers of width 64, 8 query and 4 key heads of 8, MLP of
172, vocabulary of 131; a tower of 3 blocks of width 48, MLP of 100, one block with full attention.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_sr1.config.adapter import AdapterConfig
from megatron_sr1.config.run import Config, ModelConfig
from megatron_sr1.model.hf_config import parse_hf_config
from megatron_sr1.records import (
    Completion,
    Example,
    Message,
    Prompt,
    Reading,
    Rollout,
    TrainSample,
    VisionInputs,
)
from megatron_sr1.runtime.gpus import DEVICE_NAMES, GPUS, peak_of
from megatron_sr1.trainer.throughput import Throughput, peak_flops
from tests.planned_models import raw_config

HF_CONFIG = parse_hf_config(raw_config())
WEIGHTS = 4 * 64 * (64 + 2 * 32 + 64 + 3 * 172)  # of the text layers: q, k and v, output, MLP
TOKEN = 2 * WEIGHTS  # operations
PAIR = 4 * 4 * 64  # of a query with a key, in 4 layers: 2 for the score, 2 for the value
LOGITS = 2 * 64 * 131
GRID = (1, 8, 8)  # 64 patches, a whole window of 8 x 8
TOWER = (
    2 * 64 * 3 * 48 * (4 * 48 + 3 * 100)  # products with weights
    + 4 * 64 * 3 * 64 * 48  # attention: all three blocks see 64 patches
    + 2 * 64 * (3 * 2 * 14 * 14) * 48  # patches to width 48
    + 2 * 16 * (4 * 48) * (4 * 48 + 64)  # merger, 16 tokens
)


def sequence(tokens, targets):
    """Forward pass of a sequence, each token meeting half of it; targets have logits."""
    return tokens * TOKEN + tokens * tokens / 2 * PAIR + targets * LOGITS


def sample(tokens, grids=(), targets=1, index=0):
    mask = np.arange(tokens) >= tokens - targets
    return TrainSample(index, len(grids), np.zeros(tokens, np.int64), mask, grids)


@pytest.fixture
def count(groups):
    """Makes a counter of two ranks that do the same."""

    def make(freeze=(), peak_tflops=0.0, tensor_rank=0, spec="local", targets=()):
        config = Config(model=ModelConfig(freeze=list(freeze), spec=spec))
        if targets:
            config.adapter = AdapterConfig(rank=4, targets=list(targets))
        config.logging.peak_tflops = peak_tflops
        tensor = replace(groups.tensor, rank=tensor_rank)
        two = replace(groups, world=replace(groups.world, size=2), tensor=tensor)
        return Throughput(config, HF_CONFIG, two)

    return make


def take(counter, **seconds):
    """Metrics of a step with these times, in which two ranks do the same."""
    times = {f"time/{name}_seconds": value for name, value in seconds.items()}
    return counter.take(times, {name: 2 * value for name, value in counter.counted.items()})


def test_an_update_is_three_forward_passes_over_text_and_images(count):
    counter = count(peak_tflops=1e-3)
    counter.count_samples(
        "update", [sample(20, (GRID,), 7), sample(10, index=1), sample(30, targets=0)]
    )
    work = 3 * (sequence(20, 7) + TOWER + sequence(10, 1))
    assert take(counter, update=0.5, step=2.0) == pytest.approx(
        {
            "perf/update_tokens_per_second": 2 * 30 / 0.5,
            "perf/update_tflops_per_rank": work / 0.5 / 1e12,
            "perf/update_mfu": work / 0.5 / 1e9,
            "perf/step_tokens_per_second": 2 * 30 / 2.0,
            "perf/step_tflops_per_rank": work / 2.0 / 1e12,
            "perf/step_mfu": work / 2.0 / 1e9,
        },
        rel=1e-12,
    )
    assert take(counter, update=0.5, step=2.0) == {}, "the former step counts again"


def test_a_frozen_tower_goes_forward_once_and_logprobs_are_a_forward_pass(count):
    counter = count(["^visual[.]"], peak_tflops=1e-3)
    for phase in ("old_logprobs", "reference", "update"):
        counter.count_samples(phase, [sample(20, (GRID,))])
    told = take(counter, old_logprobs=1.0, reference=4.0, update=1.0, step=10.0)
    forward, update = sequence(20, 1) + TOWER, 3 * sequence(20, 1) + TOWER
    assert told["perf/old_logprobs_mfu"] == pytest.approx(forward / 1e9)
    assert told["perf/reference_mfu"] == pytest.approx(forward / 4e9)
    assert told["perf/update_mfu"] == pytest.approx(update / 1e9)
    assert told["perf/step_mfu"] == pytest.approx((2 * forward + update) / 1e10)


@pytest.mark.parametrize(("targets", "tower"), [(["o_proj"], 1), (["o_proj", "qkv"], 2)])
def test_with_adapters_weights_pass_gradients_on_and_have_none(targets, tower, count):
    counter = count(targets=targets)
    counter.count_samples("update", [sample(20, (GRID,))])
    work = take(counter, update=1.0, step=1.0)["perf/update_tflops_per_rank"] * 1e12
    assert work == pytest.approx(2 * sequence(20, 1) + tower * TOWER)


@pytest.mark.parametrize("spec", ["local", "transformer_engine"])
def test_a_prompt_counts_once_for_its_samples_if_rows_share_it(count, spec):
    counter = count(spec=spec)
    counter.count_samples("reference", [sample(30, (GRID,), 10), sample(26, (GRID,), 6)])
    work = 2 * TOWER + sequence(30, 10) + sequence(26, 6)
    if spec == "local":  # the second begins with the 20 tokens of the first one's prompt
        work -= TOWER + sequence(20, 0)
    told = take(counter, reference=1.0, step=1.0)
    assert told["perf/reference_tflops_per_rank"] == pytest.approx(work / 1e12)
    assert told["perf/reference_tokens_per_second"] == 2 * 56


def test_of_the_ranks_that_share_samples_only_the_first_counts_them(count):
    found = []
    for tensor_rank in (0, 1):
        counter = count(tensor_rank=tensor_rank)
        counter.count_samples("update", [sample(20)])
        found.append(take(counter, update=1.0, step=1.0))
    assert found[0] and not found[1]


def test_a_rollout_is_its_prompt_once_and_what_both_passes_sample(count):
    example = Example(5, "000005", "a.tar", (Message("user", "<image>?"),), "7", 1)
    vision = VisionInputs(torch.zeros(0), torch.tensor([GRID]))
    prompt = Prompt(example, (0,) * 30, vision)

    def completion(tokens, finish="stop"):
        return Completion((1,) * tokens, (), "", finish)

    def rollout(number, tokens, description, *answers):
        reading = Reading(tuple(map(completion, answers))) if answers else None
        made = completion(tokens)
        return Rollout(5, number, prompt.token_ids, made, description, reading, 0)

    rollouts = [
        rollout(0, 8, "two", 4),
        rollout(1, 6, "two", 4),  # the same description is read once
        rollout(2, 2, None),
    ]
    counter = count()
    counter.count_rollouts([prompt], rollouts, {(5, "two"): (0,) * 12, (5, ""): (0,) * 9})
    prompts = 30 * TOKEN + 30 * 15 * PAIR + TOWER + 12 * TOKEN + 12 * 6 * PAIR
    sampled = sum(
        new * (TOKEN + LOGITS) + new * (before + new / 2) * PAIR
        for before, new in ((30, 8), (30, 6), (30, 2), (12, 4))
    )
    told = take(counter, pass1=1.5, pass2=0.5, step=4.0)
    assert told == pytest.approx(
        {
            "perf/rollout_tokens_per_second": 2 * 20 / 2.0,
            "perf/rollout_tflops_per_rank": (prompts + sampled) / 2.0 / 1e12,
        },
        rel=1e-12,
    )


def test_a_peak_is_known_or_given_and_never_guessed(monkeypatch):
    assert peak_flops(0.0, torch.device("cpu")) is None
    assert peak_flops(0.25, torch.device("cpu")) == 0.25e12
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA H100 80GB HBM3")
    assert peak_flops(0.0, torch.device("cuda")) == 989e12
    assert peak_of("NVIDIA H100 PCIe") is None
    assert set(DEVICE_NAMES.values()) == set(GPUS)
