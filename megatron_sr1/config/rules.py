"""Check a resolved configuration: each setting by itself, then settings that depend on others.

A rule is a pair: True if it is broken, and the message, in which {KEY} stands for KEY=VALUE.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from operator import attrgetter

from megatron_sr1.config.fields import check_setting, settings
from megatron_sr1.config.run import Config
from megatron_sr1.errors import ConfigError

LARGEST_BETA2 = 0.995
"""Of a second moment in bfloat16: with 8 bits, v * beta2 rounds back to v beyond 1 - 2^-8."""
Rules = Iterator[tuple[bool, str]]


def validate(config: Config) -> None:
    """Check values beyond their types.

    Raises:
        ConfigError: naming key, value and what is accepted.
    """
    for key, each, value in settings(config):
        check_setting(key, each, value)
    groups: list[Callable[[Config], Rules]] = [_model, _memory, _run]
    groups += [] if config.stage == "sft" else [_pass2, _rollout]
    groups += [_algorithm] if config.stage == "grpo" else []
    for rules in groups:
        for is_broken, message in rules(config):
            if is_broken:
                raise ConfigError(
                    re.sub(r"\{([a-z0-9_.]+)\}", lambda m: _given(config, m[1]), message)
                )


def _given(config: Config, key: str) -> str:
    value = attrgetter(key)(config)
    return f"{key}={str(value).lower() if isinstance(value, bool) else value}"


def _model(config: Config) -> Rules:
    model, parallel = config.model, config.parallel
    yield (
        parallel.sequence and parallel.tensor == 1,
        "parallel.sequence=true needs parallel.tensor of 2 or more",
    )
    yield (
        parallel.pipeline == 1 and (parallel.virtual > 1 or len(parallel.stage_layers) > 0),
        "parallel.virtual and parallel.stage_layers need parallel.pipeline of 2 or more",
    )
    for pattern in model.freeze:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ConfigError(
                f"model.freeze: {pattern!r} is no regular expression: {error}; a published name, "
                "with its dots as [.], matches itself"
            ) from None
    yield (
        model.fp8 is not None and model.spec != "transformer_engine",
        "model.fp8 needs model.spec=transformer_engine",
    )
    keeps = model.bf16_layers_at_start + model.bf16_layers_at_end > 0
    kept = "{model.bf16_layers_at_start}, {model.bf16_layers_at_end}"
    yield (
        keeps and model.fp8 is None,
        f"{kept}: without model.fp8 no layer is in FP8; set it or leave these out",
    )
    yield (
        keeps and model.fp8_recipe == "delayed",
        f"{kept}: delayed scaling takes all layers or none; set model.fp8_recipe=current, "
        "blockwise or mxfp8",
    )


def _memory(config: Config) -> Rules:
    optimizer, rollout, dtype = config.optimizer, config.rollout, config.model.dtype
    yield (
        rollout.quantization is not None and dtype != "bfloat16",
        "{rollout.quantization} is for weights in bfloat16, not {model.dtype}; set "
        "model.dtype=bfloat16",
    )
    for name in ("state", "gradients"):
        yield (
            getattr(optimizer, name) == "bfloat16" and dtype != "bfloat16",
            f"optimizer.{name}=bfloat16 is for weights in bfloat16, not {{model.dtype}}; set "
            f"model.dtype=bfloat16 or optimizer.{name}=float32",
        )
    is_special = optimizer.state == "bfloat16" or optimizer.offload
    yield (
        is_special and not config.parallel.distributed_optimizer,
        "{optimizer.state}, {optimizer.offload}: only the distributed optimizer supports this; set "
        "parallel.distributed_optimizer=true",
    )
    yield (
        rollout.make_room == "optimizer" and (dtype == "float32" or is_special),
        "{rollout.make_room} with {model.dtype}, {optimizer.state}, {optimizer.offload}: it moves "
        "float32 state beside bfloat16 weights; set rollout.make_room=gradients, or "
        "optimizer.offload=true to keep the state in host memory always",
    )
    yield (
        optimizer.state == "bfloat16" and optimizer.beta2 > LARGEST_BETA2,
        "{optimizer.beta2} with {optimizer.state}: a second moment in bfloat16 cannot shrink by "
        f"less than 2^-8 of itself; set {LARGEST_BETA2} or less",
    )


def _run(config: Config) -> Rules:
    optimizer, checkpoint, steps = config.optimizer, config.checkpoint, config.logging.profile_steps
    yield (
        config.data.min_pixels > config.data.max_pixels,
        "{data.min_pixels} is more than {data.max_pixels}",
    )
    yield (
        optimizer.schedule != "constant" and optimizer.min_learning_rate > optimizer.learning_rate,
        "{optimizer.min_learning_rate} is more than {optimizer.learning_rate}; a decay ends below "
        "its peak",
    )
    if steps:
        yield (
            len(steps) != 2 or steps[0] > steps[1],
            f"logging.profile_steps is {steps}; expected [first, last], from 1",
        )
        yield (
            config.stage != "eval" and steps[0] > optimizer.num_steps,
            "{logging.profile_steps} begins after the last step, {optimizer.num_steps}",
        )
    if checkpoint.keep_best and config.stage != "eval":
        keep = "{checkpoint.keep_best}"
        yield config.stage == "sft", f"{keep} needs an evaluation, and stage=sft has none"
        yield not config.data.eval, f"{keep} needs an evaluation of data.eval, which is not set"
        yield (
            checkpoint.keep_last == 0,
            f"{keep}: checkpoint.keep_last=0 keeps all; set it to 1 or more",
        )
        yield (
            config.reward.recipe == "vision_r1" and checkpoint.best_by != "max accuracy",
            "{checkpoint.best_by} needs descriptions, and reward.recipe=vision_r1 has none; use "
            "'max accuracy'",
        )


def _pass2(config: Config) -> Rules:
    rollout = config.rollout
    by_likelihood, is_greedy = rollout.pass2_mode == "likelihood", rollout.pass2_temperature == 0
    several = rollout.pass2_samples > 1
    yield (
        by_likelihood and (several or not is_greedy),
        "rollout.pass2_mode=likelihood samples no answers, {rollout.pass2_samples} and "
        "{rollout.pass2_temperature} would do nothing; leave both out or set pass2_mode=generate",
    )
    yield (
        several and is_greedy,
        "{rollout.pass2_samples} greedy answers are one answer; set rollout.pass2_temperature",
    )
    for setting, is_set in {
        "rollout.pass2_mode": by_likelihood,
        "rollout.pass2_samples": several,
        "reward.question_baseline": config.reward.question_baseline,
    }.items():
        yield (
            is_set and config.stage == "grpo" and config.reward.recipe != "vision_sr1",
            f"{{{setting}}} is about the self-reward, and {{reward.recipe}} has none; use "
            "recipe=vision_sr1",
        )


def _rollout(config: Config) -> Rules:
    data, rollout = config.data, config.rollout
    yield (
        rollout.top_p != 1.0 or rollout.top_k != 0,
        "{rollout.top_p}, {rollout.top_k}: training rollouts are sampled from the whole "
        "distribution; set top_p=1 and top_k=0",
    )
    yield (
        data.max_prompt_tokens + rollout.max_response_tokens > rollout.max_model_len,
        "{data.max_prompt_tokens} + {rollout.max_response_tokens} is more than "
        "{rollout.max_model_len}; raise the last or lower one of the others",
    )


def _algorithm(config: Config) -> Rules:
    yield (
        config.rollout.samples_per_prompt < 2,
        "{rollout.samples_per_prompt} with stage=grpo: a response is compared with the others of "
        "its prompt, and alone it would teach nothing; set 2 or more, for example 8",
    )
    yield (
        config.algorithm.credit != "scalar" and config.reward.recipe != "vision_sr1",
        "{algorithm.credit} divides the self-reward, and {reward.recipe} has none; use "
        "credit=scalar or recipe=vision_sr1",
    )
    yield (
        config.data.prompts_per_step % config.algorithm.prompts_per_update > 0,
        "{algorithm.prompts_per_update} does not divide {data.prompts_per_step}",
    )
