"""What a configuration's types do not say: accepted values, ranges, settings that need others.

In: a resolved configuration. Out: nothing, or a `ConfigError` that names key, value and what is
accepted.
"""

from __future__ import annotations

import math
from typing import Any

from omegaconf import DictConfig, OmegaConf

from megatron_sr1.config import Config
from megatron_sr1.errors import ConfigError

CHOICES: dict[str, tuple[str | None, ...]] = {
    "stage": ("sft", "grpo", "eval"),
    "model.dtype": ("float32", "bfloat16"),
    "model.spec": ("local", "transformer_engine"),
    "model.fp8": (None, "hybrid", "e4m3"),
    "model.fp8_recipe": ("delayed", "current", "blockwise", "mxfp8"),
    "parallel.vision": ("tensor", "images"),
    "model.recompute": ("none", "selective", "full"),
    "data.prompt_style": ("full", "brief"),
    "rollout.pass2": ("fork", "barrier"),
    "rollout.pass2_order": ("question_first", "description_first"),
    "rollout.pass2_mode": ("generate", "likelihood"),
    "rollout.quantization": (None, "fp8_per_channel", "fp8_per_tensor"),
    "rollout.make_room": ("none", "gradients", "optimizer"),
    "reward.grader": ("rules", "math_verify"),
    "reward.likelihood": ("per_token", "probability", "linear"),
    "reward.recipe": ("vision_sr1", "see_think", "vision_r1"),
    "algorithm.advantage": ("grpo", "dr_grpo", "rloo"),
    "algorithm.credit": ("scalar", "component", "span"),
    "algorithm.loss": ("token_mean", "sequence_mean", "dr_grpo", "gspo"),
    "algorithm.importance_sampling": ("off", "token", "sequence"),
    "optimizer.schedule": ("constant", "linear", "cosine"),
    "optimizer.state": ("float32", "bfloat16"),
    "optimizer.gradients": ("float32", "bfloat16"),
    "checkpoint.best_by": (
        *("max accuracy", "max self_reward", "max description_exact", "min shortcut_rate"),
    ),
    "logging.level": ("debug", "info", "warning"),
    "logging.wandb": ("off", "offline", "online"),
    "launch.device": ("auto", "cpu", "cuda"),
}
AT_LEAST_ONE = (
    "parallel.tensor",
    "parallel.pipeline",
    "parallel.context",
    "parallel.virtual",
    "data.prompts_per_step",
    "data.pack_tokens",
    "rollout.tensor_parallel",
    "rollout.samples_per_prompt",
    "rollout.max_response_tokens",
    "rollout.max_reading_tokens",
    "rollout.pass2_samples",
    "algorithm.prompts_per_update",
    "algorithm.importance_cap",
    "algorithm.max_refills",
    "model.logprob_chunk_tokens",
    "checkpoint.max_in_flight",
)

LARGEST_BETA2 = 0.995
"""Of a second moment in bfloat16: with 8 bits, v * beta2 rounds back to v beyond 1 - 2^-8."""

ABOVE_ZERO = (
    "rollout.temperature",
    "algorithm.std_floor",
    "algorithm.answer_weight",
    "algorithm.visual_weight",
    "reward.grader_timeout_seconds",
    "reward.likelihood_nats",
    "optimizer.learning_rate",
)
NOT_NEGATIVE = (
    "algorithm.format_share",
    "algorithm.mask_beyond_nats",
    "algorithm.gspo_clip_low",
    "algorithm.gspo_clip_high",
)

LARGEST_INTEGER = 2**63 - 1


def keys() -> list[str]:
    """All dotted keys that a configuration may set."""
    found: list[str] = []

    def walk(node: DictConfig, prefix: str) -> None:
        for key in node:
            name = prefix + str(key)
            if not OmegaConf.is_missing(node, key) and isinstance(node[key], DictConfig):
                walk(node[key], name + ".")
            else:
                found.append(name)

    walk(OmegaConf.structured(Config), "")
    return found


def validate(config: Config) -> None:
    """Check values that types cannot.

    Raises:
        ConfigError: naming key, value and what is accepted.
    """
    for key, accepted in CHOICES.items():
        value = _get(config, key)
        if value not in accepted:
            shown = " | ".join(str(a) for a in accepted)
            raise ConfigError(f"{key} is {value!r}; expected {shown}")
    _validate_numbers(config)
    for key in AT_LEAST_ONE:
        if _get(config, key) < 1:
            raise ConfigError(f"{key} is {_get(config, key)}; expected 1 or more")
    if config.parallel.sequence and config.parallel.tensor == 1:
        raise ConfigError("parallel.sequence=true needs parallel.tensor of 2 or more")
    if config.parallel.pipeline == 1 and (
        config.parallel.virtual > 1 or config.parallel.stage_layers
    ):
        raise ConfigError(
            "parallel.virtual and parallel.stage_layers need parallel.pipeline of 2 or more"
        )
    _validate_fp8(config)
    for key in ABOVE_ZERO:
        if _get(config, key) <= 0:
            raise ConfigError(f"{key} is {_get(config, key)}; expected more than 0")
    for key in NOT_NEGATIVE:
        if _get(config, key) < 0:
            raise ConfigError(f"{key} is {_get(config, key)}; expected 0 or more")
    _validate_memory(config)
    _validate_profile(config)
    _validate_keep_best(config)
    if config.stage != "sft":
        _validate_rollout(config)


def _validate_memory(config: Config) -> None:
    """Settings of what is held in memory that need others."""
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
            "distributed optimizer holds its state so; set parallel.distributed_optimizer=true"
        )
    if config.rollout.make_room == "optimizer" and (
        config.model.dtype == "float32" or optimizer.state == "bfloat16" or optimizer.offload
    ):
        raise ConfigError(
            f"rollout.make_room=optimizer with model.dtype={config.model.dtype}, "
            f"optimizer.state={optimizer.state}, optimizer.offload={optimizer.offload}: it moves "
            "float32 state beside bfloat16 weights; set rollout.make_room=gradients, or "
            "optimizer.offload=true to hold the state in host memory always"
        )
    if optimizer.state == "bfloat16" and optimizer.beta2 > LARGEST_BETA2:
        raise ConfigError(
            f"optimizer.beta2={optimizer.beta2} with optimizer.state=bfloat16: a second moment in "
            f"bfloat16 cannot shrink by less than 2^-8 of itself; set {LARGEST_BETA2} or less"
        )


def _validate_fp8(config: Config) -> None:
    """FP8 and what needs it."""
    model = config.model
    if model.fp8 and model.spec != "transformer_engine":
        raise ConfigError("model.fp8 needs model.spec=transformer_engine")
    kept = f"model.bf16_layers_at_start={model.bf16_layers_at_start}, bf16_layers_at_end="
    kept += str(model.bf16_layers_at_end)
    if not model.bf16_layers_at_start and not model.bf16_layers_at_end:
        return
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
    """The best are known by an evaluation, and all are kept anyway where none goes."""
    checkpoint = config.checkpoint
    told = f"checkpoint.keep_best={checkpoint.keep_best}"
    if not checkpoint.keep_best or config.stage == "eval":
        return
    if config.stage == "sft":
        raise ConfigError(f"{told} goes by an evaluation, and stage=sft makes none; leave it out")
    if not config.data.eval:
        raise ConfigError(f"{told} goes by an evaluation of data.eval, which is not set")
    if checkpoint.keep_last == 0:
        raise ConfigError(f"{told}: checkpoint.keep_last=0 keeps all; set it to 1 or more")
    if config.reward.recipe == "vision_r1" and checkpoint.best_by != "max accuracy":
        raise ConfigError(
            f"checkpoint.best_by={checkpoint.best_by!r} needs descriptions, and reward.recipe="
            "vision_r1 has none; use 'max accuracy'"
        )


def _validate_numbers(config: Config) -> None:
    """No field takes a count below zero, nor a number that is none."""
    for key in keys():
        value = _get(config, key)
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{key} is {value}; expected a finite number")
        if type(value) is int and not 0 <= value <= LARGEST_INTEGER:
            raise ConfigError(f"{key} is {value}; expected 0 to {LARGEST_INTEGER}")
    if not 0 <= config.reward.max_ungraded_share <= 1:
        raise ConfigError(
            f"reward.max_ungraded_share is {config.reward.max_ungraded_share}; expected 0 to 1"
        )
    if config.data.min_pixels > config.data.max_pixels:
        raise ConfigError(
            f"data.min_pixels={config.data.min_pixels} is more than data.max_pixels="
            f"{config.data.max_pixels}"
        )


def _validate_pass2(config: Config) -> None:
    """Settings of pass 2 that need others."""
    rollout = config.rollout
    told = f"rollout.pass2_samples={rollout.pass2_samples}"
    heat = f"rollout.pass2_temperature={rollout.pass2_temperature}"
    if rollout.pass2_temperature < 0:
        raise ConfigError(f"{heat}; expected 0 (greedy) or more")
    if rollout.pass2_mode == "likelihood":
        if rollout.pass2_samples > 1 or rollout.pass2_temperature > 0:
            raise ConfigError(
                f"rollout.pass2_mode=likelihood samples no answers, {told} and {heat} would do "
                "nothing; leave both out or set pass2_mode=generate"
            )
    elif rollout.pass2_samples > 1 and rollout.pass2_temperature == 0:
        raise ConfigError(f"{told} greedy answers are one answer; set rollout.pass2_temperature")
    asked = {
        "rollout.pass2_mode=likelihood": rollout.pass2_mode == "likelihood",
        told: rollout.pass2_samples > 1,
        "reward.question_baseline=true": config.reward.question_baseline,
    }
    for setting, is_set in asked.items():
        if is_set and config.stage == "grpo" and config.reward.recipe != "vision_sr1":
            raise ConfigError(
                f"{setting} is about the self-reward, and reward.recipe={config.reward.recipe} has "
                "none; use recipe=vision_sr1"
            )


def _validate_rollout(config: Config) -> None:
    _validate_pass2(config)
    if config.rollout.canary_bound < 0:
        raise ConfigError(
            f"rollout.canary_bound is {config.rollout.canary_bound}; expected 0 or more"
        )
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
    if credit != "scalar" and recipe != "vision_sr1":
        raise ConfigError(
            f"algorithm.credit={credit} shares out the self-reward, and reward.recipe={recipe} has "
            "none; use credit=scalar or recipe=vision_sr1"
        )
    if config.data.prompts_per_step % config.algorithm.prompts_per_update:
        raise ConfigError(
            f"algorithm.prompts_per_update={config.algorithm.prompts_per_update} does not divide "
            f"data.prompts_per_step={config.data.prompts_per_step}"
        )


def _get(config: Config, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value
