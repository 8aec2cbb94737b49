"""Settings of the optimizer's memory: what they hold, that they agree, stop and go on.

Not covered here: pinned memory and kernels of a GPU (tests/gpu/test_low_memory_gpu.py), tensor and
pipeline parallelism, virtual stages.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_sr1.demo.digits import make_digits
from megatron_sr1.observability.metrics import read_lines

SCRIPT = Path(__file__).parent / "ranks" / "low_memory.py"
ROOT = Path(__file__).resolve().parents[2]
SETTINGS = ("f-f", "f-fo", "b-f", "b-fo", "b-b", "b-bo", "b-bg")
BYTES = {"f-f": 8, "f-fo": 8, "b-f": 12, "b-fo": 12, "b-b": 6, "b-bo": 6, "b-bg": 6}
"""Of state a parameter, beyond the weights themselves, over all ranks."""


def run_plans(run_ranks, num_ranks, out, model, *plans):
    run_ranks(SCRIPT, num_ranks, out, model, *plans)
    return out, json.loads((out / "found.json").read_text())


@pytest.fixture(scope="module")
def one(tiny_model, run_ranks, tmp_path_factory):
    """On one rank: all settings, and what some saved taken up by others."""
    out = tmp_path_factory.mktemp("one")
    pairs = ("b-b:b-b", "b-b:b-bo", "b-fo:b-f", "b-f:b-fo", "b-f:b-b", "b-b:b-f")
    plans = [*SETTINGS, *(f"{out}/saved/{pair}" for pair in pairs)]
    return run_plans(run_ranks, 1, out, tiny_model, *plans)


def left_by(found, name):
    """Weights by name, and this state: one list of tensors a rank."""
    left = torch.load(found[0] / f"{name}.pt", weights_only=True)
    return left["weights"], [tensor for rank in left["state"] for tensor in rank]


def assert_same(found, name, expected):
    weights, state = left_by(found, name)
    expected_weights, expected_state = left_by(found, expected)
    assert weights.keys() == expected_weights.keys() and len(state) == len(expected_state)
    for key, tensor in weights.items():
        assert torch.equal(tensor, expected_weights[key]), key
    assert all(map(torch.equal, state, expected_state))


def distance(weights, others):
    """Euclidean, over all weights."""
    gaps = [(weights[name].double() - others[name].double()).norm() for name in weights]
    return float(torch.stack(gaps).norm())


@pytest.mark.parametrize("setting", SETTINGS)
def test_state_holds_the_bytes_that_the_documentation_says(one, setting):
    found = one[1][setting]
    assert found["state_bytes"] == BYTES[setting]
    assert found["live"] == ["torch.bfloat16" if setting[0] == "b" else "torch.float32"]
    assert found["gradients"] == ["torch.bfloat16" if "g" in setting else "torch.float32"]


@pytest.mark.parametrize("setting", ["f-f", "b-f", "b-b"])
def test_offloaded_state_gives_the_same_numbers_bitwise(one, setting):
    """In float32 also: the optimizer of the low settings against Megatron's own over torch's.

    With warm-up, decay of the rate, weight decay, and gradients clipped at every update.
    """
    assert one[1][f"{setting}o"]["updates"] == one[1][setting]["updates"]
    assert_same(one, f"{setting}o", setting)
    assert all(line["grad_norm"] > 2 for line in one[1][setting]["updates"])


@pytest.mark.parametrize("setting", ["b-b", "b-bg"])
def test_bfloat16_state_follows_float32_state(one, tiny_model, setting):
    low, full = one[1][setting]["updates"], one[1]["b-f"]["updates"]
    assert full[-1]["loss"] < full[0]["loss"] - 0.5
    for update, other in zip(low, full, strict=True):
        assert update["loss"] == pytest.approx(other["loss"], rel=1e-3)
        assert update["grad_norm"] == pytest.approx(other["grad_norm"], rel=5e-3)
    start = {n: t.bfloat16() for n, t in load_file(tiny_model / "model.safetensors").items()}
    weights, expected = left_by(one, setting)[0], left_by(one, "b-f")[0]
    assert 0 < distance(weights, expected) < 0.03 * distance(start, expected)


def test_exported_weights_are_the_live_bfloat16_without_the_compensation(one):
    """What goes to the engine and to Hugging Face files."""
    weights, state = left_by(one, "b-b")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert one[1]["b-b"]["exported_are_live"]
    compensation = torch.cat([t.flatten() for t in state[2::3]])
    assert compensation.count_nonzero() > 0.9 * compensation.numel()


@pytest.mark.parametrize("pair", ["b-b:b-b", "b-b:b-bo", "b-f:b-fo", "b-fo:b-f"])
def test_a_resumed_run_has_the_numbers_of_one_never_stopped_offloaded_or_not(one, pair):
    saved = pair.split(":")[0]
    assert one[1][pair]["updates"] == one[1][saved]["updates"][3:]
    assert_same(one, pair, saved)


@pytest.mark.parametrize("pair", ["b-f:b-b", "b-b:b-f"])
def test_state_of_the_other_kind_is_refused(one, pair):
    """A compensation read as weights, or the reverse, would ruin the run without a word."""
    refused = one[1][pair]["refused"]
    kinds = {"f": "float32", "b": "bfloat16"}
    assert f"optimizer state is {kinds[pair[2]]}, this run's is {kinds[pair[-1]]}" in refused


@pytest.fixture(scope="module")
def two(one, tiny_model, run_ranks, tmp_path_factory):
    """On two data-parallel ranks, and back on one."""
    out, back = tmp_path_factory.mktemp("two"), tmp_path_factory.mktemp("back")
    plans = [f"{out}/saved/b-b:b-b", f"{out}/saved/b-fo:b-fo"]
    found = run_plans(run_ranks, 2, out, tiny_model, "b-b", "b-fo", *plans)
    return found, run_plans(run_ranks, 1, back, tiny_model, *plans)


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["b-b", "b-fo"])
def test_two_data_parallel_ranks_share_the_state_and_learn_as_one_does(
    one, two, tiny_model, setting
):
    found, _ = two
    assert found[1][setting]["state_bytes"] == BYTES[setting]
    for update, other in zip(found[1][setting]["updates"], one[1][setting]["updates"], strict=True):
        assert update["loss"] == pytest.approx(other["loss"], rel=3e-4)
    start = {n: t.bfloat16() for n, t in load_file(tiny_model / "model.safetensors").items()}
    expected = left_by(one, setting)[0]
    gap = distance(left_by(found, setting)[0], expected)
    assert gap < 0.02 * distance(start, expected)


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["b-b", "b-fo"])
def test_two_ranks_go_on_bitwise_and_one_rank_takes_over_from_them(two, setting):
    found, back = two
    pair = f"{setting}:{setting}"
    assert found[1][pair]["updates"] == found[1][setting]["updates"][3:]
    assert_same(found, pair, setting)
    for update, other in zip(
        back[1][pair]["updates"], found[1][setting]["updates"][3:], strict=True
    ):
        assert update == pytest.approx(other, rel=1e-5)
    weights, expected = left_by(back, pair)[0], left_by(found, setting)[0]
    assert distance(weights, expected) < 1e-3


COLD_START = [
    "stage=sft",
    "evaluation.sets=",
    "data.prompts_per_step=64",
    "optimizer.num_steps=100",
    "optimizer.learning_rate=2e-3",
    "optimizer.min_learning_rate=2e-4",
    "optimizer.warmup_steps=20",
    "launch.num_processes=1",
    "checkpoint.every_steps=0",
]


@pytest.mark.slow
def test_digits_in_bfloat16_are_learnt_as_in_float32(tiny_model, tmp_path):
    """The demo's cold start, shorter: both runs at once, with the same batches."""
    shards = make_digits(tmp_path, 1, num_train=16, num_eval=16, num_cold_start=3000)
    low = ["state=bfloat16", "gradients=bfloat16", "offload=true"]
    ways = {
        "full": ["model.dtype=float32"],
        "low": ["model.dtype=bfloat16", *(f"optimizer.{setting}" for setting in low)],
    }
    runs = {}
    for name, more in ways.items():
        places = [f"output={tmp_path / name}", f"model.path={tiny_model}"]
        places += [f"data.train={shards['cold_start']}"]
        command = [sys.executable, "-m", "megatron_sr1", "train", "examples/digits_cpu.yaml"]
        with open(tmp_path / f"{name}.log", "w") as log:
            command += [*COLD_START, *places, *more]
            runs[name] = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
    last = {}
    for name, run in runs.items():
        assert run.wait(timeout=500) == 0, (tmp_path / f"{name}.log").read_text()[-3000:]
        losses = [line["actor/loss"] for line in read_lines(tmp_path / name / "metrics.jsonl")]
        assert losses[0] > 5.5
        last[name] = sum(losses[-10:]) / 10
    assert last["full"] < 1.2
    assert last["low"] < 1.1 * last["full"]
    exported = load_file(tmp_path / "low" / "hf" / "model.safetensors")
    assert all(torch.equal(t, t.bfloat16().to(t.dtype)) for t in exported.values())
