"""A resume in which the place in the learning-rate schedule means something else says so.

Sources: THUDM/slime#1546, #1761, verl-project/verl#7953, deepinsight/insightface#2143.
"""

import json
import logging
import shutil

import pytest

from megatron_sr1.config.loading import load_config
from megatron_sr1.trainer.actor import load_actor_model, make_actor
from megatron_sr1.trainer.context import Context

pytestmark = pytest.mark.field
SETTINGS = [
    *("stage=grpo", "data.train=x", "model.dtype=float32", "data.prompts_per_step=8"),
    *("algorithm.prompts_per_update=4", "optimizer.num_steps=6", "checkpoint.every_steps=3"),
    *("optimizer.learning_rate=1e-4", "optimizer.schedule=cosine", "optimizer.warmup_steps=2"),
]
SAID = "the learning-rate schedule is not the checkpoint's: "


def resumed(directory, output, groups, *changes):
    """A context and an actor that go on from what is in `output`, if anything is."""
    config = load_config(None, [f"model.path={directory}", f"output={output}", *SETTINGS, *changes])
    chunks, hf_config, source = load_actor_model(config, groups)
    num_updates = config.updates_per_step * config.optimizer.num_steps
    actor = make_actor(config, chunks, hf_config, source, groups, num_updates)
    context = Context(config, groups, 100)
    context.start(actor)
    return context, actor


def updates(context, actor, num_steps):
    """Steps of which only the schedule takes part; the learning rate of each update."""
    rates = []
    for _ in range(num_steps * context.config.updates_per_step):
        rates.append(actor.optimizer.param_groups[0]["lr"])
        actor.scheduler.step(increment=1)
    return rates


@pytest.fixture(scope="module")
def run(tiny_model, groups, tmp_path_factory):
    """A run of 6 steps with 2 updates each, saved after 3 and 6; its learning rates."""
    output = tmp_path_factory.mktemp("run")
    context, actor = resumed(tiny_model, output, groups)
    rates = []
    for _ in range(6):
        rates += updates(context, actor, 1)
        context.finish_step({}, actor)
    assert rates == sorted(rates[:3]) + sorted(rates[3:], reverse=True) and len(rates) == 12
    context.close()
    return output, rates


@pytest.fixture
def half(run, tmp_path):
    """The run as it was when it was stopped after 3 steps, and the 12 rates."""
    shutil.copytree(run[0], tmp_path / "half")
    shutil.rmtree(tmp_path / "half" / "checkpoints" / "step_6")
    (tmp_path / "half" / "checkpoints" / "latest").write_text("step_3\n")
    return tmp_path / "half", run[1]


def test_nothing_is_said_where_nothing_changes_and_the_rates_go_on(
    tiny_model, groups, half, caplog
):
    output, rates = half
    with caplog.at_level(logging.INFO):
        context, actor = resumed(tiny_model, output, groups, "checkpoint.every_steps=0")
    assert context.step == 3 and actor.scheduler.num_steps == 6
    assert updates(context, actor, 3) == rates[6:]
    assert SAID not in caplog.text


def test_smaller_updates_give_the_schedule_another_place(tiny_model, groups, half, caplog):
    output, rates = half
    with caplog.at_level(logging.WARNING):
        context, actor = resumed(tiny_model, output, groups, "algorithm.prompts_per_update=2")
    last = updates(context, actor, 3)
    assert len(last) == 12
    assert caplog.text.count(SAID) == 1
    assert (
        SAID + "updates a step 2 -> 4, updates in all 12 -> 24, learning rate of the next update "
        f"{rates[6]:.3g} -> {last[0]:.3g}, learning rate of the last update {rates[-1]:.3g} -> "
        f"{last[-1]:.3g}"
    ) in caplog.text
    assert last[-1] > 2 * rates[-1]


def test_more_steps_for_a_finished_run_raise_the_rate_again(
    tiny_model, groups, run, tmp_path, caplog
):
    shutil.copytree(run[0], tmp_path / "more")
    with caplog.at_level(logging.WARNING):
        context, actor = resumed(tiny_model, tmp_path / "more", groups, "optimizer.num_steps=8")
    rates = updates(context, actor, 2)
    assert len(rates) == 4 and rates[0] > run[1][-1]
    said = caplog.text.split(SAID)[1]
    assert "optimizer.num_steps 6 -> 8, updates in all 12 -> 16, learning rate of the next" in said
    assert (
        f"-> {rates[0]:.3g}, learning rate of the last update {run[1][-1]:.3g} -> {rates[-1]:.3g}"
        in said
    )


@pytest.mark.parametrize(
    ("key", "old", "new"),
    [
        ("optimizer.learning_rate", 1e-4, 1e-5),
        ("optimizer.min_learning_rate", 0.0, 5e-5),
        ("optimizer.schedule", "cosine", "linear"),
        ("optimizer.warmup_steps", 2, 9),
    ],
)
def test_each_setting_of_the_schedule_is_named_and_takes_effect(
    tiny_model, groups, half, caplog, key, old, new
):
    output, rates = half
    with caplog.at_level(logging.WARNING):
        context, actor = resumed(tiny_model, output, groups, f"{key}={new}")
    found = updates(context, actor, 3)
    assert f"{SAID}{key} {_text(old)} -> {_text(new)}, learning rate of the next" in caplog.text
    assert (
        found != rates[6:]
        and f", learning rate of the last update {rates[-1]:.3g} -> {found[-1]:.3g}" in caplog.text
    )
    if key == "optimizer.learning_rate":
        assert found == pytest.approx([rate / 10 for rate in rates[6:]], rel=1e-5)


def _text(value):
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def test_what_the_optimizer_is_told_anew_takes_effect_too(tiny_model, groups, half):
    changes = ("optimizer.beta1=0.5", "optimizer.epsilon=1e-6", "optimizer.weight_decay=0.5")
    _, actor = resumed(tiny_model, half[0], groups, *changes)
    for group in actor.optimizer.param_groups:
        assert (group["betas"][0], group["eps"]) == (0.5, 1e-6)
        assert group["weight_decay"] == 0.5 * group["wd_mult"]


@pytest.mark.parametrize("schedule", [None, "6 of 12", {"updates in all": "x" * 1000}])
def test_a_checkpoint_without_totals_or_with_odd_ones_still_loads(
    tiny_model, groups, half, caplog, schedule
):
    folder = half[0] / "checkpoints" / "step_3"
    (folder / "manifest.json").unlink()
    record = json.loads((folder / "state.json").read_text())
    record["format"] = 1
    del record["state"]["schedule"]
    if schedule is not None:
        record["state"]["schedule"] = schedule
    (folder / "state.json").write_text(json.dumps(record))
    with caplog.at_level(logging.WARNING):
        context, actor = resumed(tiny_model, half[0], groups, "optimizer.num_steps=8")
    assert actor.scheduler.num_steps == 6 and context.step == 3
    said = [r.getMessage() for r in caplog.records if SAID in r.getMessage()]
    assert len(said) == isinstance(schedule, dict) and all(len(text) < 200 for text in said)
