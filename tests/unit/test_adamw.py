"""The optimizer inside Megatron's: against torch's, and what bfloat16 state can and cannot do.

Not covered here: shards, clipping and checkpoints (tests/distributed/test_low_memory.py), and the
kernel that runs on a GPU (tests/gpu/test_low_memory_gpu.py).
"""

import math
import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from megatron_sr1.config.loading import load_config
from megatron_sr1.config.training import OptimizerConfig
from megatron_sr1.errors import ConfigError
from megatron_sr1.trainer.optimizer import ShardAdamW

F32, BF16 = torch.float32, torch.bfloat16
NUM = 4096


def start(scale=0.02):
    """Weights that bfloat16 holds exactly."""
    generator = torch.Generator().manual_seed(0)
    return (scale * torch.randn(NUM, generator=generator)).to(BF16).float()


def gradients(number, drift=0.5):
    generator = torch.Generator().manual_seed(1)
    return [1e-3 * (torch.randn(NUM, generator=generator) + drift) for _ in range(number)]


def shard_adamw(weights, state, offload=False, **settings):
    group = {"params": [weights], "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0}
    return ShardAdamW([{**group, "lr": 1e-6, **settings}], state, offload)


def train(optimizer, steps, rate=None):
    (group,) = optimizer.param_groups
    for number, gradient in enumerate(steps):
        group["lr"] = rate(number) if rate else group["lr"]
        group["params"][0].decoupled_grad = gradient.clone()
        optimizer.step()
    return optimizer.state[group["params"][0]]


def train_torch(weights, steps, rate=None, **settings):
    adam = torch.optim.AdamW([weights], **{"betas": (0.9, 0.99), "weight_decay": 0.0, **settings})
    for number, gradient in enumerate(steps):
        adam.param_groups[0]["lr"] = rate(number) if rate else adam.param_groups[0]["lr"]
        weights.grad = gradient.to(weights.dtype)
        adam.step()
    return weights


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("offload", [False, True])
def test_float32_state_is_torch_adamw_bitwise(dtype, offload):
    """With weight decay and a schedule; over weights in bfloat16, the master weights are."""
    weights, expected, steps = start().to(dtype), start(), gradients(20)
    state = train(
        shard_adamw(weights, F32, offload, weight_decay=0.1), steps, lambda n: 1e-3 / (n + 1)
    )
    train_torch(expected, steps, lambda n: 1e-3 / (n + 1), lr=1e-3, weight_decay=0.1)
    assert torch.equal(state["master_param"], expected)
    assert torch.equal(weights, expected.to(dtype))
    assert not torch.equal(expected, start())


@pytest.mark.field
@pytest.mark.parametrize("state", [F32, BF16])
def test_the_ends_of_the_configurations_ranges_keep_weights_finite(state):
    """Where no gradient comes, 0 / epsilon must be 0; torch's own checks must pass."""
    limits = {field.name: field.metadata for field in fields(OptimizerConfig)}
    largest = math.nextafter(limits["beta1"]["below"], 0)
    ends = {"eps": limits["epsilon"]["at_least"], "lr": limits["learning_rate"]["at_most"]}
    none, some = torch.zeros(NUM), gradients(2)
    for betas in ((0.0, 0.0), (largest, largest)):
        weights = start().to(state)
        train(shard_adamw(weights, state, betas=betas, **ends), [none, *some, none])
        assert weights.isfinite().all()
        expected = train_torch(start(), [none, *some, none], betas=betas, **ends)
        assert expected.isfinite().all()


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_offloaded_state_is_the_same_bitwise(dtype):
    kept, sent = start().to(BF16), start().to(BF16)
    state = train(shard_adamw(kept, dtype), gradients(20))
    other = train(shard_adamw(sent, dtype, offload=True), gradients(20))
    assert torch.equal(kept, sent)
    assert all(torch.equal(state[name], other[name]) for name in state)


def test_small_updates_add_up_in_the_compensation_where_bfloat16_alone_stands_still():
    steps = gradients(200)
    expected = train_torch(start(), steps, lr=1e-6)
    moved = expected - start()
    weights = start().to(BF16)
    state = train(shard_adamw(weights, BF16), steps)
    master = weights.double() + state["master_param"].double()
    gap = (master - expected.double()).abs()
    # Each update rounds the compensation by 2^-18 of the weight at most, and its length by 2^-8.
    assert (gap <= start().abs() * 2.0**-13 + 0.05 * moved.abs().mean()).all()
    assert gap.mean() < 0.02 * moved.abs().mean()
    alone = train_torch(start().to(BF16), steps, lr=1e-6).float() - start()
    large = start().abs() > 2.0**-10  # half a unit of smaller ones is within an update's reach
    assert large.float().mean() > 0.9 and alone[large].abs().max() == 0


def test_updates_below_a_16_bit_unit_of_a_large_weight_are_lost():
    """The price: at 1e-6, a norm's weight of 1 stops on its way; float32 state does not."""
    weights, expected = torch.ones(NUM, dtype=BF16), torch.ones(NUM)
    steps = [torch.full((NUM,), 1e-3)] * 2000
    state = train(shard_adamw(weights, BF16), steps)
    train_torch(expected, steps, lr=1e-6)
    reached = 1 - (weights.double() + state["master_param"].double())
    assert (1 - expected.double()).mean() == pytest.approx(2e-3, rel=5e-2)
    assert 2.0**-13 < reached.mean() < 2.0**-10


def test_weight_decay_that_bfloat16_weights_would_lose_is_kept():
    zero = [torch.zeros(NUM)] * 500
    weights = start().to(BF16)
    settings = {"lr": 2e-3, "weight_decay": 1e-2}
    state = train(shard_adamw(weights, BF16, **settings), zero)
    master = weights.double() + state["master_param"].double()
    assert master.norm() / start().double().norm() == pytest.approx((1 - 2e-5) ** 500, abs=5e-4)
    alone = train_torch(start().to(BF16), zero, **settings)
    assert torch.equal(alone.float(), start())


@pytest.mark.parametrize(("beta2", "low", "high"), [(0.995, 0.8, 1.2), (0.999, 1.5, 3.0)])
def test_second_moment_in_bfloat16_is_right_up_to_the_largest_beta2(beta2, low, high):
    steps = gradients(2000, drift=0.0)
    state = train(shard_adamw(start().to(BF16), BF16, betas=(0.9, beta2)), steps)
    exact = train(shard_adamw(start(), F32, betas=(0.9, beta2)), steps)
    correction = 1 - beta2**2000  # optimi's moments are corrected as they are held
    ratio = (state["exp_avg_sq"].double() / (exact["exp_avg_sq"].double() / correction)).mean()
    assert low < ratio < high


@pytest.mark.parametrize(
    ("weights", "state", "size"), [(BF16, BF16, 6), (BF16, F32, 12), (F32, F32, 8)]
)
def test_held_bytes_a_parameter(weights, state, size):
    optimizer = shard_adamw(start().to(weights), state)
    ((shard, tensors),) = optimizer.state.items()
    held = [t for t in tensors.values() if t.data_ptr() != shard.data_ptr()]  # beside the weights
    assert sum(t.numel() * t.element_size() for t in held) == size * NUM


LOW = "optimizer.state=bfloat16"


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ([LOW, "model.dtype=float32"], "model.dtype is float32"),
        (["optimizer.gradients=bfloat16", "model.dtype=float32"], "optimizer.gradients=bfloat16"),
        ([LOW, "parallel.distributed_optimizer=false"], "distributed_optimizer=true"),
        (["optimizer.offload=true", "parallel.distributed_optimizer=false"], "offload=True"),
        ([LOW], "optimizer.beta2=0.999"),
        (["optimizer.state=float16"], "float32 | bfloat16"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(overrides, named):
    with pytest.raises(ConfigError) as caught:
        load_config(None, ["model.path=x", *overrides])
    assert named in str(caught.value)
    load_config(None, ["model.path=x", LOW, "optimizer.offload=true", "optimizer.beta2=0.99"])


ROOT = Path(__file__).resolve().parents[2]
PARAMETERS = {"3B": 3_754_622_976, "7B": 8_292_166_656}


def test_documented_table_is_what_the_formula_gives():
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in (ROOT / "docs" / "memory.md").read_text().splitlines()
        if line.startswith("| `state=") or line.startswith("| optimizer settings")
    ]
    columns = [re.match(r"(\dB), (\d)", title).groups() for title in rows[0][1:]]
    assert len(rows) == 6 and len(columns) == 6
    for name, *cells in rows[1:]:
        gradients = 2 if "gradients=bfloat16" in name else 4
        state = 6 if "state=bfloat16" in name else 12
        for (model, ranks), cell in zip(columns, cells, strict=True):
            whole, shared = PARAMETERS[model] / 1e9, state / int(ranks)
            if "offload" in name:
                expected = f"{whole * (2 + gradients):.1f} + {whole * shared:.1f}"
            else:
                expected = f"{whole * (2 + gradients + shared):.1f}"
            assert cell == expected, (name, model, ranks)


def test_documented_command_is_a_valid_configuration():
    text = (ROOT / "docs" / "memory.md").read_text()
    command = text.split("# needs a GPU\n")[1].split("```")[0].replace("\\\n", " ").split()
    config = load_config(ROOT / command[2], command[3:])
    optimizer = config.optimizer
    assert (optimizer.state, optimizer.gradients, optimizer.beta2) == ("bfloat16", "bfloat16", 0.99)
