"""The stages of a run on one rank: put the parts together, train or evaluate, export."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

from megatron_sr1.config.run import Config
from megatron_sr1.errors import ConfigError
from megatron_sr1.evaluation.evaluate import WAYS, HeldOut, evaluation_scorer
from megatron_sr1.rewards.score import Scorer
from megatron_sr1.rollout.engine import Engine
from megatron_sr1.runtime import failure
from megatron_sr1.runtime.device import Device, stop_distributed
from megatron_sr1.runtime.groups import Groups
from megatron_sr1.trainer import setup
from megatron_sr1.trainer.actor import Actor, Reference, make_actor
from megatron_sr1.trainer.context import Context
from megatron_sr1.trainer.grpo import sync, train_grpo
from megatron_sr1.trainer.optimizer import updates_per_step
from megatron_sr1.trainer.samples import Samples
from megatron_sr1.trainer.sft import train_sft

log = logging.getLogger(__name__)


def run_stage(config: Config) -> int:
    """Run the configured stage on this rank; returns the exit status.

    It is 0, too, where the run was asked to leave and has saved: a rank with another status would
    have srun and torchrun kill those that are still closing.
    """
    with failure.deadline("start", config.launch.setup_deadline_seconds):
        device, groups = setup.start_ranks(config)
    STAGES[config.stage](config, device, groups)
    # Not after a failure: leaving the groups would show the others a broken connection before they
    # can read what went wrong.
    stop_distributed()
    return 0


def run_sft(config: Config, device: Device, groups: Groups) -> None:
    """Supervised fine-tuning of `model.path` on `data.train`."""
    context, samples, actor, _ = start(config, groups, config.optimizer.num_steps)
    train_sft(context, actor, samples)
    if context.is_leaving:
        return context.close()
    export(context, actor)
    finish(context, samples)


def run_grpo(config: Config, device: Device, groups: Groups) -> None:
    """GRPO from `model.path` on `data.train`, and an evaluation at the end if `data.eval` is set.

    The engine starts from `model.path` too and is synced before it samples.
    """
    # Before minutes of loading: a reward function that does not load ends the run at once.
    scorer, judging = setup.make_scorer(config), evaluation_scorer(config)
    context, samples, actor, reference = start(
        config, groups, updates_per_step(config) * config.optimizer.num_steps
    )
    with context.phase("setup"):
        directory = setup.engine_directory(config, groups)
        engine = setup.make_engine(config, directory, context.processor, device)
    rate = rating(context, actor, engine, judging) if config.checkpoint.keep_best else None
    train_grpo(context, actor, engine, samples, scorer, reference, rate)
    scorer.close()
    if context.is_leaving:
        return context.close()
    export(context, actor)
    if config.data.eval:
        sync(context, actor, engine, version=context.step)
        judge(context, engine, judging)
    finish(context, samples)


def run_eval(config: Config, device: Device, groups: Groups) -> None:
    """Evaluation of `model.path` on `data.eval`, by the engine alone."""
    if (Path(config.output) / "checkpoints").exists():
        raise ConfigError(
            f"{config.output} holds a training run, whose files an evaluation would replace; give "
            "another output"
        )
    scorer = evaluation_scorer(config)
    context = Context(config, groups, setup.make_processor(config), 0)
    context.open()
    with context.phase("setup"):
        directory = setup.engine_directory(config, groups)
        engine = setup.make_engine(config, directory, context.processor, device)
    judge(context, engine, scorer)
    context.close()


def start(
    config: Config, groups: Groups, num_updates: int
) -> tuple[Context, Samples, Actor, Reference | None]:
    """What both training stages need, resumed if there is something to resume.

    The reference is copied from `model.path` before a checkpoint is loaded over it.
    """
    processor = setup.make_processor(config)
    samples = setup.open_samples(config, config.data.train, processor)
    if config.stage == "grpo" and config.data.prompts_per_step > len(samples):
        raise ConfigError(
            f"data.prompts_per_step={config.data.prompts_per_step}, but {config.data.train} has "
            f"{len(samples)} samples; a step must not hold a prompt twice"
        )
    context = Context(config, groups, processor, len(samples))
    with context.phase("setup"):
        chunks, hf_config, source = setup.load_actor_model(config, groups)
        needs_reference = config.stage == "grpo" and config.algorithm.kl_coefficient > 0
        reference = Reference(chunks) if needs_reference else None
        actor = make_actor(config, chunks, hf_config, source, groups, num_updates)
        context.start(actor)
    return context, samples, actor, reference


def rating(
    context: Context, actor: Actor, engine: Engine, scorer: Scorer
) -> Callable[[], dict[str, float]]:
    """Return a function that evaluates the actor by greedy answers to `data.eval`; collective."""
    config = context.config
    held_out = HeldOut(context, engine, scorer)
    metric = config.checkpoint.best_by.split()[1]

    def rate() -> dict[str, float]:
        sync(context, actor, engine, version=context.step)
        rates = held_out.judge(f"step_{context.step}", temperature=0.0)
        engine.sleep()
        actor.take_room()  # what is saved next is where a save looks for it
        held_out.samples.forget()
        if metric not in rates:
            raise ConfigError(
                f"checkpoint.best_by={config.checkpoint.best_by!r}: the evaluation of "
                f"{config.data.eval} gave {', '.join(rates)}, not {metric}"
            )
        return rates

    return rate


def judge(context: Context, engine: Engine, scorer: Scorer) -> None:
    """Evaluate sampled and greedy, and write the rates to summary.json."""
    held_out, summary = HeldOut(context, engine, scorer), {}
    for way, temperature in zip(WAYS, (context.config.rollout.temperature, 0.0), strict=True):
        summary[way] = held_out.judge(way, temperature)
        log.info("held-out, %s: %s", way, summary[way])
    scorer.close()
    if context.is_writer:
        (context.run_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")


def export(context: Context, actor: Actor) -> None:
    """Write the Hugging Face model, if it is wanted."""
    if context.config.checkpoint.export_hf:
        with context.phase("export"):
            actor.save_hf(context.run_dir / "hf")


def finish(context: Context, samples: Samples) -> None:
    """Write the report, with pictures of the training set."""
    context.close()
    if context.is_writer:
        from megatron_sr1.report.report import write_report

        with context.phase("report"):
            log.info("report: %s", write_report(context.run_dir, samples.reader.images))


STAGES: dict[str, Callable[[Config, Device, Groups], None]] = {
    "sft": run_sft,
    "grpo": run_grpo,
    "eval": run_eval,
}
