"""The demo: a tiny model learns to see digits and to reward its own seeing, on two CPU ranks.

`prepare` makes shards and a model with random weights, `train` runs on each rank: an imperfect
cold start, then GRPO twice from that one checkpoint with the same budget, without self-reward
(see_think) and with it (vision_sr1), each judged on the same held-out questions. `finish` writes
summary.json from the saved evaluation files. One engine serves all models.
"""

from __future__ import annotations

import itertools
import json
import logging
import shutil
import statistics
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table

from megatron_sr1 import stages
from megatron_sr1.config.loading import load_config
from megatron_sr1.config.run import Config
from megatron_sr1.demo.digits import corpus_texts, make_digits
from megatron_sr1.demo.tiny_model import make_tiny_model
from megatron_sr1.errors import ConfigError
from megatron_sr1.evaluation.evaluate import HeldOut, make_sets
from megatron_sr1.evaluation.scorers import evaluation_scorers
from megatron_sr1.observability.metrics import read_lines
from megatron_sr1.report.demo_page import DEMO_RUNS
from megatron_sr1.report.verdicts import paired
from megatron_sr1.rewards.grading_pool import GradingPool
from megatron_sr1.rewards.score import VERDICTS, rates
from megatron_sr1.rollout.engine import Engine
from megatron_sr1.runtime.files import write_text
from megatron_sr1.runtime.groups import Groups
from megatron_sr1.trainer.context import Context
from megatron_sr1.trainer.grpo import train_grpo
from megatron_sr1.trainer.sft import train_sft
from megatron_sr1.trainer.sync import start_engine, sync

log = logging.getLogger(__name__)

NUM_RANKS = 2
MODELS = tuple(DEMO_RUNS)
WAYS = {"sampled": 1.0, "greedy": 0.0}
CONFIG = Path(__file__).parents[2] / "examples" / "digits_cpu.yaml"
"""Settings of the GRPO runs, and of the cold start what `COLD_START` does not change."""
COLD_START = [
    "stage=sft",
    "data.prompts_per_step=64",
    "optimizer.num_steps=600",
    "optimizer.learning_rate=2e-3",
    "optimizer.min_learning_rate=2e-4",
    "optimizer.warmup_steps=20",
]
ON_THE_WAY = [
    "evaluation.at_start=true",
    "evaluation.every_steps=10",
    "evaluation.max_samples=256",
]
"""Evaluations of the GRPO runs while they train, for the curves of the report."""


ADAPTER_SETTINGS = ["optimizer.learning_rate=1e-3", "optimizer.min_learning_rate=1e-4"]
"""Of GRPO runs that train adapters, which take larger steps than all weights do."""


def prepare(output: Path, seed: int, adapter_rank: int = 0) -> None:
    """Write shards of the digits and a model with random weights, unless they exist."""
    log.info("1/4 data: questions about handwritten digits, and a small model to train")
    if not CONFIG.is_file():
        raise ConfigError(
            f"{CONFIG}: no such file; the demo takes its settings from the checkout: install the "
            "package from there with `pip install -e .`, or use `make demo`"
        )
    made, own = output / "seed.json", [seed, adapter_rank] if adapter_rank else seed
    if made.is_file():
        if json.loads(made.read_text()) != own:
            what = "another seed or adapter rank"
            raise ConfigError(f"{output} is a demo of {what}; give another --output")
        return
    for part in ("data", "model"):  # left by an interrupted start
        shutil.rmtree(output / part, ignore_errors=True)
    make_digits(output / "data", seed)
    make_tiny_model(output / "model", corpus_texts(), seed=seed)
    made.write_text(f"{json.dumps(own)}\n")


def train(output: Path, seed: int, adapter_rank: int = 0) -> None:
    """Run all stages of the demo on one rank; with a rank above 0, GRPO trains adapters."""
    started = time.monotonic()
    adapter = [f"adapter.rank={adapter_rank}", *ADAPTER_SETTINGS] if adapter_rank else []
    configs = {name: _config(output, seed, name, *adapter) for name in MODELS[1:]}
    cold = _config(output, seed, "cold_start")
    with stages.joined_ranks(cold) as groups:
        log.info("2/4 cold start (%d steps)", cold.num_steps)
        context, samples, actor, _ = stages.start(cold, groups)
        train_sft(context, actor, samples)
        context.close()
        actor.save_hf(Path(cold.output) / "hf")
        whole = (
            "evaluation.max_samples=0",
            "evaluation.every_steps=0",
            "evaluation.at_start=false",
        )
        judge_config = _config(output, seed, "vision_sr1", f"output={output}", *whole)
        log.info("starting the engine")
        with context.phase("setup"):
            engine = start_engine(judge_config, groups, samples.processor)
        judging = Context(judge_config, groups, 0)
        judging.open()
        with evaluation_scorers(judge_config) as scorers:
            sets = make_sets(judging, engine, samples.processor, scorers)
            _evaluate(sets, "cold_start")
            for number, (name, config) in enumerate(configs.items(), start=3):
                log.info("%d/4 %s (%d steps)", number, DEMO_RUNS[name], config.num_steps)
                _train_grpo(config, groups, engine, scorers)
                _evaluate(sets, name)
        if groups.world.rank == 0:
            # A line per start that reached the end; `finish` takes the first, which did the
            # training unless an earlier start was interrupted.
            with open(output / "seconds.jsonl", "a") as file:
                file.write(json.dumps({"seconds": time.monotonic() - started}) + "\n")


def _train_grpo(
    config: Config, groups: Groups, engine: Engine, scorers: dict[str, GradingPool]
) -> None:
    """Train, with evaluations on the way; `scorers` are those of the held-out sets."""
    context, samples, actor, reference = stages.start(config, groups)
    sets = make_sets(context, engine, samples.processor, scorers)
    evaluate = partial(stages.evaluate_actor, context, actor, engine, sets, [])
    with GradingPool(config.reward, config.rollout.max_response_tokens) as grading:
        train_grpo(context, actor, engine, samples, grading, reference, evaluate)
    context.close()
    sync(context, actor, engine)
    actor.save_hf(context.run_dir / "hf")


def _evaluate(sets: Sequence[HeldOut], name: str) -> None:
    """Evaluate the engine's weights on the held-out questions, sampled and greedily."""
    for each in sets:
        found = each.evaluate(f"{name}_{each.name}")
        shown = ", ".join(f"{rate} {value:.3g}" for rate, value in found.items())
        log.info("%s, held-out questions, %s: %s", DEMO_RUNS[name], each.name, shown)


def finish(output: Path) -> dict[str, Any]:
    """Write and return summary.json from the saved files.

    It holds rates of each model; paired differences of every two models as [mean, half the width of
    its 95 % interval]; seconds of the whole, median seconds of a GRPO step.
    """
    judged = {
        name: {way: read_lines(output / f"eval/{name}_{way}.jsonl") for way in WAYS}
        for name in MODELS
    }
    summary: dict[str, Any] = {
        name: {way: rates(lines) for way, lines in ways.items()} for name, ways in judged.items()
    }
    summary["differences"] = differences = {}
    for (first, before), (second, after) in itertools.combinations(judged.items(), 2):
        differences[f"{second} - {first}"] = {
            way: {rate: paired(before[way], after[way], key) for key, (rate, _) in VERDICTS.items()}
            for way in WAYS
        }
    steps = read_lines(output / "vision_sr1" / "metrics.jsonl")
    summary["seconds"] = read_lines(output / "seconds.jsonl")[0]["seconds"]
    seconds = [s["time/step_seconds"] for s in steps if s["step"]]  # 0 is an evaluation
    summary["median_step_seconds"] = statistics.median(seconds)
    write_text(output / "summary.json", json.dumps(summary, indent=2) + "\n")
    return summary


def comparison(summary: dict[str, Any]) -> Table:
    """Return the table of the models' rates on the held-out questions, %, for the terminal."""
    table = Table(title="Held-out questions, %")
    table.add_column("")
    for name in MODELS:
        table.add_column(DEMO_RUNS[name], justify="right")
    for way in WAYS:
        table.add_row(f"{way}:")
        for rate, label in VERDICTS.values():
            cells = (f"{100 * summary[name][way][rate]:.1f}" for name in MODELS)
            table.add_row(label, *cells)
        table.add_section()
    return table


def _config(output: Path, seed: int, name: str, *more: str) -> Config:
    """Configuration of one of the demo's stages."""
    cold = name == "cold_start"
    own = [
        *(COLD_START if cold else ON_THE_WAY),
        "checkpoint.every_steps=0",
        f"reward.recipe={'vision_sr1' if cold else name}",
        f"model.path={output / ('model' if cold else 'cold_start/hf')}",
        f"data.train={output / 'data' / ('cold_start' if cold else 'train')}",
        *(f"evaluation.sets.{way}.path={output / 'data' / 'eval'}" for way in WAYS),
        *(f"evaluation.sets.{way}.temperature={value}" for way, value in WAYS.items()),
        f"output={output / name}",
        f"seed={seed}",
    ]
    return load_config(CONFIG, [*own, *more])
