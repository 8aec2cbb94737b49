"""The stages of a run on one rank: put the parts together, train or evaluate, export."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch

from megatron_sr1.config.rules import with_steps
from megatron_sr1.config.run import Config
from megatron_sr1.dry_run import check_output
from megatron_sr1.errors import ConfigError
from megatron_sr1.evaluation.evaluate import HeldOut, can_resume, make_sets
from megatron_sr1.evaluation.held_out_loss import HeldOutLoss, make_losses
from megatron_sr1.evaluation.judge import has_too_many_unjudged, opened_judge
from megatron_sr1.evaluation.results import write_results
from megatron_sr1.evaluation.scorers import evaluation_scorers
from megatron_sr1.rewards.grading_pool import GradingPool
from megatron_sr1.rollout.engine import Engine
from megatron_sr1.runtime import failure
from megatron_sr1.runtime.device import select_device, start_distributed, stop_distributed
from megatron_sr1.runtime.groups import Groups, make_groups
from megatron_sr1.runtime.rng import seed_everything
from megatron_sr1.trainer.actor import (
    Actor,
    Reference,
    add_adapters,
    load_actor_model,
    make_actor,
)
from megatron_sr1.trainer.context import Context
from megatron_sr1.trainer.data_checks import check_sizes
from megatron_sr1.trainer.grpo import train_grpo
from megatron_sr1.trainer.samples import Samples, make_processor
from megatron_sr1.trainer.sft import train_sft
from megatron_sr1.trainer.sync import start_engine, sync

log = logging.getLogger(__name__)
ONEDNN_KERNELS = 32
"""Kernels that oneDNN caches, instead of 1,024: packed samples bring new shapes in every step, and
host memory would grow for hundreds of steps. A step takes as long: all layers share a shape."""


def start_ranks(config: Config) -> Groups:
    """Start torch.distributed and make the layout's groups."""
    launch = config.launch
    device = select_device(launch.device)
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # torchrun leaves each of them one thread
    torch.set_num_threads(launch.threads or max(1, len(os.sched_getaffinity(0)) // ranks))
    if device.type == "cpu":
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(ONEDNN_KERNELS))
    start_distributed(device, launch.collective_timeout_seconds)
    failure.see_others()
    groups = make_groups(config.parallel, device, timeout_seconds=launch.collective_timeout_seconds)
    seed_everything(config.seed, groups)
    return groups


@contextmanager
def joined_ranks(config: Config) -> Iterator[Groups]:
    """Start this rank with the others, and leave them after the block."""
    with failure.deadline("start", config.launch.setup_deadline_seconds):
        groups = start_ranks(config)
    yield groups
    # Not after a failure: the others would see a broken connection before they can read why.
    stop_distributed()


def run_sft(config: Config, groups: Groups) -> int:
    """Fine-tune `model.path` on the training data, evaluating `evaluation.sets`."""
    is_writer = groups.world.rank == 0
    with (
        evaluation_scorers(config, is_leader=leads(config, groups)) as scorers,
        opened_judge(config, is_writer) as judge,
    ):
        context, samples, actor, _ = start(config, groups)
        losses, engine, sets = make_losses(context, actor, samples.processor), None, []
        if config.evaluation.generate:
            with context.phase("setup"):
                actor.offload(config.rollout.make_room)
                engine = start_engine(config, groups, samples.processor)
                engine.sleep()  # until an evaluation
                actor.restore()
            asked = make_sets(context, engine, samples.processor, scorers, judge)
            sets = [each for each in asked if each.has_answers]
        evaluate = partial(evaluate_actor, context, actor, engine, sets, losses)
        train_sft(context, actor, samples, evaluate if losses or sets else None)
        export(context, actor)
    return finish(context)


def run_grpo(config: Config, groups: Groups) -> int:
    """Train `model.path` with GRPO on the training data, evaluating `evaluation.sets`."""
    # These first: a function that does not load, or a key that is missing, stops the run at once.
    is_leader, longest = leads(config, groups), config.rollout.max_response_tokens
    with (
        GradingPool(config.reward, longest, is_leader) as grading,
        evaluation_scorers(config, is_leader=is_leader) as scorers,
        opened_judge(config, groups.world.rank == 0) as judge,
    ):
        context, samples, actor, reference = start(config, groups)
        with context.phase("setup"):
            actor.offload(config.rollout.make_room)
            engine = start_engine(config, groups, samples.processor)
        sets = make_sets(context, engine, samples.processor, scorers, judge)
        evaluate = partial(evaluate_actor, context, actor, engine, sets, []) if sets else None
        is_trained = not context.has_steps_left
        train_grpo(context, actor, engine, samples, grading, reference, evaluate)
        if evaluate is not None and is_trained:  # sets that were named after the training
            evaluate(True)
        export(context, actor)
    return finish(context)


def run_eval(config: Config, groups: Groups) -> int:
    """Evaluate `model.path` on `evaluation.sets`, with the engine alone."""
    check_output(config)
    processor = make_processor(config)
    context = Context(config, groups, 0)
    context.open()
    resume = can_resume(context)
    with (
        evaluation_scorers(config, is_leader=leads(config, groups)) as scorers,
        opened_judge(config, context.is_writer) as judge,
    ):
        with context.phase("setup"):
            engine = start_engine(config, groups, processor)
        sets = make_sets(context, engine, processor, scorers, judge)
        found = {each.name: each.evaluate(each.name, resume) for each in sets}
        report_rates(context, found, is_last=True)
    context.close()
    return context.exit_status


def leads(config: Config, groups: Groups) -> bool:
    """Return True on the first rank of an engine replica, which grades the replica's rollouts."""
    return groups.world.rank % config.rollout.tensor_parallel == 0


def start(config: Config, groups: Groups) -> tuple[Context, Samples, Actor, Reference | None]:
    """Make what both training stages need, and resume if there is a checkpoint.

    The reference is copied from `model.path` before a checkpoint is loaded over it.
    """
    check_output(config)
    samples = Samples(config, config.data.sets, make_processor(config))
    check_sizes(config, samples.reader.sizes)
    config = with_steps(config, len(samples))
    context = Context(config, groups, *samples.reader.sizes)
    with context.phase("setup"):
        chunks, hf_config, source = load_actor_model(config, groups)
        add_adapters(config, chunks, hf_config, groups)
        needs_reference = config.stage == "grpo" and config.algorithm.kl_coefficient > 0
        reference = Reference(chunks) if needs_reference else None
        actor = make_actor(config, chunks, hf_config, source, groups, config.num_updates)
        context.start(actor)
    return context, samples, actor, reference


def evaluate_actor(
    context: Context,
    actor: Actor,
    engine: Engine | None,
    sets: Sequence[HeldOut],
    losses: Sequence[HeldOutLoss],
    is_last: bool,
) -> dict[str, dict[str, float]]:
    """Evaluate the actor on all sets; the last time under their names, before with the step."""
    found = {name: dict[str, float]() for name in context.config.evaluation.sets}
    for loss in losses:
        found[loss.name] |= loss.evaluate()
    if engine is not None:
        sync(context, actor, engine)
        step = "" if is_last else f"_step_{context.step}"
        for each in sets:
            found[each.name] |= each.evaluate(each.name + step)
        engine.sleep()
        actor.restore()  # for a save
    report_rates(context, found, is_last)
    name, first = next(iter(found.items()))
    best_by = context.config.checkpoint.best_by
    if context.config.checkpoint.keep_best and best_by.split()[1] not in first:
        raise ConfigError(
            f"checkpoint.best_by={best_by!r} names none of the rates that the evaluation of {name} "
            f"gave: {', '.join(first)}"
        )
    return found


def report_rates(context: Context, found: dict[str, dict[str, float]], is_last: bool) -> None:
    """Log the rates of all sets; at last, write summary.json and eval/results.json.

    The command fails if too many answers were not judged, but only once it has written everything.
    """
    if not context.is_writer:
        return
    for name, rates in found.items():
        shown = (f"{rate} {value:.4g}" for rate, value in rates.items())
        log.info("held-out, %s: %s", name, ", ".join(shown))
    if is_last:
        evaluation = context.config.evaluation
        write_results(context.run_dir, evaluation, found)
        context.exit_status = int(has_too_many_unjudged(found, evaluation.judge))


def export(context: Context, actor: Actor) -> None:
    """Write the Hugging Face model and the adapter, if configured, unless the run stopped early."""
    config = context.config
    if config.checkpoint.export_hf and not context.is_leaving:
        with context.phase("export"):
            actor.save_hf(context.run_dir / "hf")
            if config.adapter.rank:
                actor.save_adapter(context.run_dir / "adapter", config.adapter, config.model.path)


def finish(context: Context) -> int:
    """Close the sinks, write the report unless the run stopped early; return the exit status."""
    context.close()
    if context.is_writer and not context.is_leaving:
        from megatron_sr1.report.report import write_report

        with context.phase("report"):
            log.info("report: %s", write_report(context.run_dir))
    return context.exit_status


STAGES: dict[str, Callable[[Config, Groups], int]] = {
    "sft": run_sft,
    "grpo": run_grpo,
    "eval": run_eval,
}
