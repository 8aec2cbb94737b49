"""A step's rollouts: which prompts, both passes on all replicas, verdicts, refills.

In: the training set, the engine and a scorer. Out: scored rollouts, equal on every rank, and what
the engine counted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from megatron_sr1.config.run import Config
from megatron_sr1.errors import DataError
from megatron_sr1.records import Prompt
from megatron_sr1.rewards.response import find_description
from megatron_sr1.rewards.score import Scorer
from megatron_sr1.rollout.engine import Engine
from megatron_sr1.rollout.pass2 import Pass2, RolloutHooks
from megatron_sr1.rollout.two_pass import RolloutStats, roll_out
from megatron_sr1.runtime.rng import request_seed
from megatron_sr1.trainer import scoring
from megatron_sr1.trainer.context import Context
from megatron_sr1.trainer.credit import Credit, credit
from megatron_sr1.trainer.samples import Samples


def roll_out_step(
    context: Context, engine: Engine, samples: Samples, scorer: Scorer, step: int
) -> tuple[list[scoring.Scored], dict[str, float]]:
    """Sample and score a step's prompts, with `filter_groups` until enough of them teach.

    Source of the filter: DAPO's dynamic sampling (arXiv 2503.14476, section 3.2). A refill draws
    as many further prompts as are missing. Every prompt drawn is consumed, kept or not, and the
    loader's cursor is saved with the step; so a resumed run draws the same.

    Returns:
        scored rollouts of all rounds and replicas in the order drawn, equal on every rank, and
        what the engine counted.

    Raises:
        DataError: no prompt could be used.
    """
    config, wanted = context.config, context.loader.per_step
    drawn = context.loader.next_step()
    graded, counted = roll_out_prompts(context, engine, samples, scorer, drawn, step)
    refills = 0
    while config.algorithm.filter_groups and refills < config.algorithm.max_refills:
        missing = wanted - len(credit_of(graded.scored, config)[0].teaching)
        further = context.loader.more(missing, drawn)
        if not further:
            break
        refills += 1
        drawn = drawn + further
        found, more = roll_out_prompts(context, engine, samples, scorer, further, step)
        graded = graded.with_more(found)
        counted = {name: value + more[name] for name, value in counted.items()}
    with context.phase("sleep"):
        engine.sleep()
    counted["reward/ungraded_share"] = context.count_ungraded(graded.ungraded, len(drawn))
    if not graded.usable:
        raise DataError("no prompt of this step could be used; see the warnings above")
    if config.algorithm.filter_groups:
        counted["filter/refills"] = float(refills)
        counted["filter/drawn_prompts"] = float(len(drawn))
    return list(graded.usable), counted


def roll_out_prompts(
    context: Context,
    engine: Engine,
    samples: Samples,
    scorer: Scorer,
    indices: Sequence[int],
    step: int,
) -> tuple[scoring.Graded, dict[str, float]]:
    """Sample and score prompts on all replicas.

    Returns:
        scored rollouts of all replicas in the order of `indices`, equal on every rank, none if no
        prompt could be used, and what the engine counted.
    """
    config = context.config
    with context.phase("prompts"):
        prompts = read_prompts(context, engine, samples, indices)
    with context.phase("pass1"):
        rollouts, stats = roll_out(
            engine,
            prompts,
            samples_per_prompt=config.rollout.samples_per_prompt,
            temperature=config.rollout.temperature,
            max_response_tokens=config.rollout.max_response_tokens,
            pass2=pass2_settings(config) if config.reward.recipe == "vision_sr1" else None,
            hooks=RolloutHooks(
                find_description,
                samples.reading_prompt,
                lambda index, sample, part: request_seed(config.seed, step, index, sample, part),
                samples.gold_answer,
            ),
        )
    context.timer.move("pass1", "pass2", stats.pass2_only_seconds)
    if engine.is_replica_leader:
        context.throughput.count_rollouts(prompts, rollouts, samples.readings)
    with context.phase("reward"):
        # The ranks of a replica hold the same rollouts: one of them grades.
        speaks = engine.is_replica_leader
        graded = scoring.score(rollouts if speaks else (), samples, scorer)
    with context.phase("share"):
        graded = scoring.share(graded, indices, speaks, context.groups)
        counted = context.sum_over_ranks(_counts(stats) if speaks else {n: 0.0 for n in _COUNTS})
    return graded, counted


def read_prompts(
    context: Context, engine: Engine, samples: Samples, indices: Sequence[int]
) -> list[Prompt]:
    """This replica's share of the prompts; those that cannot be used are skipped and counted."""
    prompts = []
    for index in indices[engine.replica :: engine.num_replicas]:
        try:
            example = samples.example(index)
            if example.answer is None:
                raise DataError(f"{example.shard} sample {example.key} has no answer to judge by")
            prompts.append(samples.prompt(index))
        except DataError as error:
            context.skip(error)
    context.count_skipped(engine.is_replica_leader)
    return prompts


_COUNTS: dict[str, Callable[[RolloutStats], float]] = {
    "rollout/response_tokens": lambda s: s.pass1_tokens,
    "rollout/reading_tokens": lambda s: s.pass2_tokens,
    "rollout/truncated": lambda s: s.truncated,
    "rollout/readings": lambda s: s.num_pass2,
    "rollout/distinct_readings": lambda s: s.num_prompts2,
    "rollout/engine_steps": lambda s: s.engine_steps,
}


def _counts(stats: RolloutStats) -> dict[str, float]:
    return {name: float(count(stats)) for name, count in _COUNTS.items()}


def pass2_settings(config: Config) -> Pass2:
    """Pass 2 as configured."""
    return Pass2(
        schedule=config.rollout.pass2,
        temperature=config.rollout.pass2_temperature,
        max_tokens=config.rollout.max_reading_tokens,
        mode=config.rollout.pass2_mode,
        num_samples=config.rollout.pass2_samples,
        question_only=config.reward.question_baseline,
    )


def credit_of(scored: Sequence[scoring.Scored], config: Config) -> tuple[Credit, dict[str, float]]:
    """Advantages of rollouts as configured, and how their groups spread."""
    return credit(
        [s.reward for s in scored],
        config.rollout.samples_per_prompt,
        config.algorithm,
        config.reward.pay_leaks,
    )
