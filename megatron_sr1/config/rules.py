"""Check a resolved configuration: each setting by itself, then settings that depend on others."""

from __future__ import annotations

import re

from megatron_sr1.config.fields import check_setting, settings
from megatron_sr1.config.run import Config
from megatron_sr1.errors import ConfigError

LARGEST_BETA2 = 0.995
"""Of a second moment in bfloat16: with 8 bits, v * beta2 rounds back to v beyond 1 - 2^-8."""


def validate(config: Config) -> None:
    """Check values beyond their types.

    Raises:
        ConfigError: naming key, value and what is accepted.
    """
    for key, each, value in settings(config):
        check_setting(key, each, value)
    _validate_numbers(config)
    if config.parallel.sequence and config.parallel.tensor == 1:
        raise ConfigError("parallel.sequence=true needs parallel.tensor of 2 or more")
    if config.parallel.pipeline == 1 and (
        config.parallel.virtual > 1 or config.parallel.stage_layers
    ):
        raise ConfigError(
            "parallel.virtual and parallel.stage_layers need parallel.pipeline of 2 or more"
        )
    _validate_freeze(config.model.freeze)
    _validate_fp8(config)
    _validate_memory(config)
    _validate_profile(config)
    _validate_keep_best(config)
    if config.stage != "sft":
        _validate_rollout(config)


def _validate_memory(config: Config) -> None:
    """Check data types and places of weights, gradients and optimizer state."""
    optimizer = config.optimizer
    if config.rollout.quantization and config.model.dtype != "bfloat16":
        raise ConfigError(
            f"rollout.quantization={config.rollout.quantization} is for weights in bfloat16, "
            f"model.dtype is {config.model.dtype}; set model.dtype=bfloat16"
        )
    for name in ("state", "gradients"):
        if getattr(optimizer, name) == "bfloat16" and config.model.dtype != "bfloat16":
            raise ConfigError(
                f"optimizer.{name}=bfloat16 is for weights in bfloat16, model.dtype is "
                f"{config.model.dtype}; set model.dtype=bfloat16 or optimizer.{name}=float32"
            )
    if (optimizer.state == "bfloat16" or optimizer.offload) and (
        not config.parallel.distributed_optimizer
    ):
        raise ConfigError(
            f"optimizer.state={optimizer.state}, optimizer.offload={optimizer.offload}: only the "
            "distributed optimizer supports this; set parallel.distributed_optimizer=true"
        )
    if config.rollout.make_room == "optimizer" and (
        config.model.dtype == "float32" or optimizer.state == "bfloat16" or optimizer.offload
    ):
        raise ConfigError(
            f"rollout.make_room=optimizer with model.dtype={config.model.dtype}, "
            f"optimizer.state={optimizer.state}, optimizer.offload={optimizer.offload}: it moves "
            "float32 state beside bfloat16 weights; set rollout.make_room=gradients, or "
            "optimizer.offload=true to keep the state in host memory always"
        )
    if optimizer.state == "bfloat16" and optimizer.beta2 > LARGEST_BETA2:
        raise ConfigError(
            f"optimizer.beta2={optimizer.beta2} with optimizer.state=bfloat16: a second moment in "
            f"bfloat16 cannot shrink by less than 2^-8 of itself; set {LARGEST_BETA2} or less"
        )


def _validate_freeze(patterns: list[str]) -> None:
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ConfigError(
                f"model.freeze: {pattern!r} is no regular expression: {error}; a published name, "
                "with its dots as [.], matches itself"
            ) from None


def _validate_fp8(config: Config) -> None:
    model = config.model
    if model.fp8 and model.spec != "transformer_engine":
        raise ConfigError("model.fp8 needs model.spec=transformer_engine")
    first, last = model.bf16_layers_at_start, model.bf16_layers_at_end
    if not first and not last:
        return
    kept = f"model.bf16_layers_at_start={first}, bf16_layers_at_end={last}"
    if not model.fp8:
        raise ConfigError(
            f"{kept}: without model.fp8 no layer is in FP8; set it or leave these out"
        )
    if model.fp8_recipe == "delayed":
        raise ConfigError(
            f"{kept}: delayed scaling takes all layers or none; set model.fp8_recipe=current, "
            "blockwise or mxfp8"
        )


def _validate_profile(config: Config) -> None:
    steps, num_steps = config.logging.profile_steps, config.optimizer.num_steps
    if steps and not (len(steps) == 2 and 1 <= steps[0] <= steps[1]):
        raise ConfigError(f"logging.profile_steps is {steps}; expected [first, last], from 1")
    if steps and config.stage != "eval" and steps[0] > num_steps:
        raise ConfigError(
            f"logging.profile_steps={steps} begins after the last step, optimizer.num_steps="
            f"{num_steps}"
        )


def _validate_keep_best(config: Config) -> None:
    checkpoint = config.checkpoint
    given = f"checkpoint.keep_best={checkpoint.keep_best}"
    if not checkpoint.keep_best or config.stage == "eval":
        return
    if config.stage == "sft":
        raise ConfigError(f"{given} needs an evaluation, and stage=sft has none; leave it out")
    if not config.data.eval:
        raise ConfigError(f"{given} needs an evaluation of data.eval, which is not set")
    if checkpoint.keep_last == 0:
        raise ConfigError(f"{given}: checkpoint.keep_last=0 keeps all; set it to 1 or more")
    if config.reward.recipe == "vision_r1" and checkpoint.best_by != "max accuracy":
        raise ConfigError(
            f"checkpoint.best_by={checkpoint.best_by!r} needs descriptions, and reward.recipe="
            "vision_r1 has none; use 'max accuracy'"
        )


def _validate_numbers(config: Config) -> None:
    data, optimizer = config.data, config.optimizer
    if data.min_pixels > data.max_pixels:
        raise ConfigError(
            f"data.min_pixels={data.min_pixels} is more than data.max_pixels={data.max_pixels}"
        )
    if optimizer.schedule != "constant" and optimizer.min_learning_rate > optimizer.learning_rate:
        raise ConfigError(
            f"optimizer.min_learning_rate={optimizer.min_learning_rate} is more than "
            f"optimizer.learning_rate={optimizer.learning_rate}; a decay ends below its peak"
        )


def _validate_pass2(config: Config) -> None:
    rollout = config.rollout
    number = f"rollout.pass2_samples={rollout.pass2_samples}"
    heat = f"rollout.pass2_temperature={rollout.pass2_temperature}"
    if rollout.pass2_mode == "likelihood":
        if rollout.pass2_samples > 1 or rollout.pass2_temperature > 0:
            raise ConfigError(
                f"rollout.pass2_mode=likelihood samples no answers, {number} and {heat} would do "
                "nothing; leave both out or set pass2_mode=generate"
            )
    elif rollout.pass2_samples > 1 and rollout.pass2_temperature == 0:
        raise ConfigError(f"{number} greedy answers are one answer; set rollout.pass2_temperature")
    needs_self_reward = {
        "rollout.pass2_mode=likelihood": rollout.pass2_mode == "likelihood",
        number: rollout.pass2_samples > 1,
        "reward.question_baseline=true": config.reward.question_baseline,
    }
    for setting, is_set in needs_self_reward.items():
        if is_set and config.stage == "grpo" and config.reward.recipe != "vision_sr1":
            raise ConfigError(
                f"{setting} is about the self-reward, and reward.recipe={config.reward.recipe} has "
                "none; use recipe=vision_sr1"
            )


def _validate_rollout(config: Config) -> None:
    _validate_pass2(config)
    if config.rollout.top_p != 1.0 or config.rollout.top_k != 0:
        raise ConfigError(
            f"rollout.top_p={config.rollout.top_p}, rollout.top_k={config.rollout.top_k}: training "
            "rollouts are sampled from the whole distribution; set top_p=1 and top_k=0"
        )
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    if longest > config.rollout.max_model_len:
        raise ConfigError(
            f"data.max_prompt_tokens={config.data.max_prompt_tokens} + rollout.max_response_tokens="
            f"{config.rollout.max_response_tokens} is more than rollout.max_model_len="
            f"{config.rollout.max_model_len}; raise the last or lower one of the others"
        )
    if config.stage == "grpo":
        _validate_algorithm(config)


def _validate_algorithm(config: Config) -> None:
    credit, recipe = config.algorithm.credit, config.reward.recipe
    if config.rollout.samples_per_prompt < 2:
        raise ConfigError(
            f"rollout.samples_per_prompt={config.rollout.samples_per_prompt} with stage=grpo: a "
            "response is compared with the others of its prompt, and alone it would teach nothing; "
            "set 2 or more, for example 8"
        )
    if credit != "scalar" and recipe != "vision_sr1":
        raise ConfigError(
            f"algorithm.credit={credit} divides the self-reward, and reward.recipe={recipe} has "
            "none; use credit=scalar or recipe=vision_sr1"
        )
    if config.data.prompts_per_step % config.algorithm.prompts_per_update:
        raise ConfigError(
            f"algorithm.prompts_per_update={config.algorithm.prompts_per_update} does not divide "
            f"data.prompts_per_step={config.data.prompts_per_step}"
        )
