"""The last checkpoints and the best stay, whatever is in the others, and after a restart too."""

import json

import pytest

from megatron_sr1.checkpoint.folders import latest_step, read_state, steps
from megatron_sr1.checkpoint.saving import remove_old
from megatron_sr1.config.loading import load_config
from megatron_sr1.config.training import CheckpointConfig
from megatron_sr1.errors import ConfigError
from megatron_sr1.trainer.context import Context
from tests.checkpoint_run import make_run


def keep(last, best, best_by="max accuracy"):
    return CheckpointConfig(keep_last=last, keep_best=best, best_by=best_by)


def rated(folder, rates):
    """Checkpoints step_1, step_2, … whose evaluations gave these; None: there was none."""
    for step, given in enumerate(rates, 1):
        target = folder / f"step_{step}"
        target.mkdir(parents=True)
        (target / ".metadata").write_bytes(b"")
        state = {} if given is None else {"evaluation": given}
        record = {"format": 2, "step": step, "layout": {}, "scheduler": None, "state": state}
        (target / "state.json").write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        (keep(1, 1), [2, 6]),
        (keep(1, 2), [2, 4, 6]),  # of equal ones the later
        (keep(2, 1, "min shortcut_rate"), [3, 5, 6]),
        (keep(3, 1), [2, 4, 5, 6]),
        (keep(1, 1, "max description_exact"), [6]),  # nothing gave it
        (keep(1, 0), [6]),
        (keep(0, 1), [1, 2, 3, 4, 5, 6]),
    ],
)
def test_the_best_and_the_last_stay(tmp_path, settings, kept):
    rates = [(0.5, 0.4), (0.9, 0.3), (0.1, 0.0), (0.5, 0.5), None, (0.2, 0.2)]
    names = ("accuracy", "shortcut_rate")
    rated(tmp_path, rates=[pair and dict(zip(names, pair, strict=True)) for pair in rates])
    remove_old(tmp_path / "step_6", settings)
    assert steps(tmp_path) == kept


@pytest.mark.parametrize("value", ["high", True, None, float("nan"), [1]])
def test_a_rating_that_is_no_number_is_none(tmp_path, value):
    rated(tmp_path, rates=[{"accuracy": 0.1}, {"accuracy": value}, {"accuracy": 0.0}])
    remove_old(tmp_path / "step_3", keep(1, 1))
    assert steps(tmp_path) == [1, 3]


def test_a_damaged_checkpoint_is_not_among_the_best(tmp_path):
    rated(tmp_path, rates=[{"accuracy": 0.4}, {"accuracy": 0.9}, {"accuracy": 0.1}])
    (tmp_path / "step_2" / ".metadata").unlink()
    remove_old(tmp_path / "step_3", keep(1, 1))
    assert steps(tmp_path) == [1, 3]


def test_a_run_keeps_its_best_across_a_restart_and_always_the_newest(tiny_model, groups, tmp_path):
    """Real saves of a real context; only what the evaluations gave is made up."""
    config = load_config(
        None,
        [
            *(
                f"model.path={tiny_model}",
                "data.train=x",
                "evaluation.sets.a.path=x",
                f"output={tmp_path}",
            ),
            *("checkpoint.every_steps=1", "checkpoint.keep_last=1", "checkpoint.keep_best=1"),
            "optimizer.num_steps=6",
        ],
    )
    kept = []
    for ratings in ([0.3, 0.9, 0.5], [0.1, 0.9, 0.8]):
        actor, context = make_run(tiny_model, groups), Context(config, groups, 8)
        context.start(actor)
        for rating in ratings:
            context.finish_step({}, actor, lambda last, rate=rating: {"a": {"accuracy": rate}})
            kept.append(steps(context.checkpoints))
            assert latest_step(context.checkpoints) == context.step == kept[-1][-1]
        context.close()
    assert kept == [[1], [2], [2, 3], [2, 4], [5], [5, 6]]
    state = read_state(context.checkpoints / "step_5")["state"]
    assert state["evaluation"] == {"accuracy": 0.9}
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[4])["evaluation/a/accuracy"] == 0.9


REFUSED = {
    "evaluation.sets is empty": [],
    "keep_last=0 keeps all": ["evaluation.sets.a.path=x", "checkpoint.keep_last=0"],
    "gives a loss with stage=sft": ["evaluation.sets.a.path=x", "stage=sft"],
    "gives verdicts with stage=grpo": [
        *("evaluation.sets.a.path=x", "checkpoint.best_by=min loss")
    ],
    "needs descriptions": [
        *(
            "evaluation.sets.a.path=x",
            "reward.recipe=vision_r1",
            "checkpoint.best_by=min shortcut_rate",
        ),
    ],
    "expected max accuracy": ["evaluation.sets.a.path=x", "checkpoint.best_by=accuracy"],
}


@pytest.mark.parametrize("said", REFUSED)
def test_what_cannot_be_rated_is_refused_before_the_run(said):
    with pytest.raises(ConfigError, match=said):
        load_config(None, ["model.path=x", "checkpoint.keep_best=1", *REFUSED[said]])
