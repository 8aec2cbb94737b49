"""Epochs and a warm-up ratio become steps and updates once, from the data, before anything else."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_sr1.cli import main
from megatron_sr1.config.loading import load_config
from megatron_sr1.config.rules import with_steps
from megatron_sr1.data.examples import Record
from megatron_sr1.data.shards import write_shards
from megatron_sr1.errors import ConfigError
from megatron_sr1.records import Message
from megatron_sr1.stages import start

ROOT = Path(__file__).resolve().parents[2]
SHAPE = ROOT / "tests" / "published" / "qwen25vl_3b.json"
SFT = ["model.path=x", "stage=sft", "data.prompts_per_step=128"]
GRPO = ["model.path=x", "data.prompts_per_step=512", "algorithm.prompts_per_update=128"]


@pytest.mark.parametrize(
    ("overrides", "num_samples", "num_steps", "warmup"),
    [
        ([*SFT, "optimizer.num_epochs=3", "optimizer.warmup_ratio=0.1"], 9000, 211, 22),
        ([*SFT, "optimizer.num_epochs=3", "optimizer.warmup_steps=7"], 128, 3, 7),
        ([*SFT, "optimizer.num_epochs=0.1"], 128 * 30, 3, 0),  # 0.1 * 30 is 3.0000000000000004
        ([*SFT, "optimizer.num_epochs=1e-9"], 128, 1, 0),
        ([*GRPO, "optimizer.num_epochs=1", "optimizer.warmup_ratio=0.25"], 47_000, 92, 92),
        ([*GRPO, "optimizer.num_steps=20", "optimizer.warmup_ratio=1"], 47_000, 20, 80),
        ([*GRPO, "optimizer.num_steps=20", "optimizer.warmup_ratio=0"], 47_000, 20, 0),
        (GRPO, 47_000, 100, 0),
    ],
)
def test_epochs_are_whole_steps_and_the_ratio_is_of_updates(
    overrides, num_samples, num_steps, warmup
):
    config = with_steps(load_config(None, overrides), num_samples)
    optimizer = config.optimizer
    assert (config.num_steps, optimizer.num_steps, optimizer.warmup_steps) == (
        *(num_steps, num_steps, warmup),
    )
    assert optimizer.num_epochs is optimizer.warmup_ratio is None
    assert config.num_updates == num_steps * (1 if config.stage == "sft" else 4)
    assert with_steps(config, 10 * num_samples) == config


STEPS, EPOCHS = "optimizer.num_steps", "optimizer.num_epochs"
WARMUP, RATIO = "optimizer.warmup_steps", "optimizer.warmup_ratio"


def test_of_two_alternatives_the_one_that_is_set_later_counts(tmp_path):
    (tmp_path / "a.yaml").write_text("optimizer: {num_steps: 9, warmup_steps: 2}\n")
    (tmp_path / "b.yaml").write_text(
        "base: a.yaml\noptimizer: {num_epochs: 2, warmup_ratio: 0.5}\n"
    )

    def lengths(name, *overrides):
        optimizer = load_config(tmp_path / name, ["model.path=x", *overrides]).optimizer
        names = ("num_steps", "num_epochs", "warmup_steps", "warmup_ratio")
        return tuple(getattr(optimizer, each) for each in names)

    assert lengths("a.yaml") == (9, None, 2, None)
    assert lengths("b.yaml") == (None, 2, 0, 0.5)
    assert lengths("b.yaml", f"{STEPS}=5") == (5, None, 0, 0.5)
    assert lengths("a.yaml", f"{EPOCHS}=1.5", f"{WARMUP}=1") == (None, 1.5, 1, None)
    with pytest.raises(ConfigError, match=f"{EPOCHS}=1: {EPOCHS} excludes {STEPS}; set one"):
        lengths("a.yaml", f"{STEPS}=5", f"{EPOCHS}=1")
    (tmp_path / "c.yaml").write_text("optimizer: {warmup_steps: 9, warmup_ratio: 0.1}\n")
    with pytest.raises(ConfigError, match=f"c.yaml: {RATIO} excludes {WARMUP}; set one of them"):
        lengths("c.yaml")
    with pytest.raises(ConfigError, match=f"{STEPS}=None, {EPOCHS}=None: set one of them"):
        lengths("b.yaml", f"{EPOCHS}=null")
    assert load_config(None, ["model.path=x", "stage=eval", f"{STEPS}=null"]).stage == "eval"


@pytest.fixture(scope="module")
def talks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("talks")
    turns = (Message("user", "3 + 4"), Message("assistant", "7"))
    write_shards([Record(turns, None, ()) for _ in range(20)], folder)
    return folder


@pytest.fixture
def arguments(talks, tmp_path):
    (tmp_path / "config.json").write_text(SHAPE.read_text())
    (tmp_path / "run.yaml").write_text("stage: sft\ndata: {prompts_per_step: 8}\n")
    paths = [f"model.path={tmp_path}", f"data.train={talks}", f"{EPOCHS}=3", f"{RATIO}=0.3"]
    return [str(tmp_path / "run.yaml"), *paths]


def test_a_dry_run_and_a_plan_show_the_steps(arguments, capsys):
    assert main(["train", *arguments, "--dry-run"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("steps")]
    assert line == (
        "steps       8 updates of 8 sequences, 3.20 epochs of 20 samples, warm-up over 3 updates"
    )
    assert main(["plan", *arguments, "--gpus", "8", "--gpu", "h100"]) == 0
    assert "\nsteps     8\n" in capsys.readouterr().out
    arguments[2] = "data.train=lost"
    assert main(["train", *arguments, "--dry-run"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("steps")]
    assert line.startswith(
        "steps       unknown without the data (optimizer.num_epochs=3); updates of"
    )
    assert line.endswith("warm-up over 30% of the updates")
    assert main(["plan", *arguments, "--gpus", "8", "--gpu", "h100"]) == 0
    assert (
        "\nsteps     unknown without the data (optimizer.num_epochs=3)\n" in capsys.readouterr().out
    )


def test_a_window_after_the_last_step_is_refused_before_any_rank_starts(arguments, capsys):
    for window, status in (("[8,9]", 0), ("[9,9]", 2)):
        assert main(["train", *arguments, "--dry-run", f"logging.profile_steps={window}"]) == status
    assert "begins after the last step, optimizer.num_steps=8" in capsys.readouterr().err


def test_a_run_saves_its_steps_and_a_resume_finds_the_same_schedule(
    tiny_model, talks, groups, tmp_path, caplog
):
    paths = [f"model.path={tiny_model}", f"data.train={talks}", f"output={tmp_path}"]
    paths += ["model.dtype=float32", "stage=sft", "data.prompts_per_step=8", f"{RATIO}=0.3"]
    config = load_config(None, [*paths, f"{EPOCHS}=3", "checkpoint.every_steps=1"])
    context, _, actor, _ = start(config, groups)
    saved = json.loads((tmp_path / "config.json").read_text())["optimizer"]
    assert (saved["num_steps"], saved["warmup_steps"], saved["num_epochs"]) == (8, 3, None)
    rates = []
    for _ in range(4):
        rates.append(actor.optimizer.param_groups[0]["lr"])
        actor.scheduler.step(increment=1)
    assert rates == pytest.approx([0, 1e-6 / 3, 2e-6 / 3, 1e-6])
    context.finish_step({}, actor)
    assert context.has_steps_left
    context.close()

    def resumed(config):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            again, *_ = start(config, groups)
        again.close()
        assert again.step == 1
        return caplog.text

    assert "schedule is not" not in resumed(config)
    as_steps = replace(config.optimizer, num_epochs=None, num_steps=8)
    assert "schedule is not" not in resumed(replace(config, optimizer=as_steps))
    longer = replace(config, optimizer=replace(config.optimizer, num_epochs=6.0))
    said = resumed(longer)
    assert "optimizer.num_steps 8 -> 15, optimizer.warmup_steps 3 -> 5" in said
