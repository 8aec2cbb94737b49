"""Reading the configuration: YAML files and overrides over the defaults, by OmegaConf.

YAML files hold differences from the defaults, or from the file that they name as `base`;
`group.key=value` overrides come last. An unknown key or an impossible
value is a `ConfigError` that names the nearest valid one. Tags that would make objects are refused
by the parser, and of OmegaConf's interpolations only `${oc.env:NAME}` is read.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

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


BASE = "base"
"""Key of a file that names the one it builds on."""
MAX_YAML_BYTES = 2**18
LARGEST_INTEGER = 2**63 - 1
_ENVIRONMENT = re.compile(r"\$\{oc\.env:[A-Za-z_][A-Za-z0-9_]*(,[^${}]*)?\}")


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


def load_config(path: str | Path | None, overrides: list[str] | None = None) -> Config:
    """Resolve a YAML file and `group.key=value` overrides over the defaults.

    Args:
        path: YAML file with differences from the defaults, or from another file that it names as
            `base`, a path beside it; None for none.
        overrides: dotted assignments, later ones win.

    Returns:
        the validated configuration.

    Raises:
        ConfigError: file absent or not a mapping, unknown key, wrong type or impossible value.
    """
    config = OmegaConf.structured(Config)
    layers: list[tuple[str, Any]] = []
    if path is not None:
        layers += _read_layers(Path(path))
    for text in overrides or []:
        layers.append((ascii(text)[1:-1][:200], _read_override(text)))
    for name, layer in layers:
        _check_interpolations(layer, name)
        try:
            config = OmegaConf.merge(config, layer)
        except ConfigKeyError as error:
            raise ConfigError(f"{name}: {_unknown(error.full_key or str(error.key))}") from None
        except OmegaConfBaseException as error:
            where = "" if error.full_key is None else f"key {error.full_key!r}: "
            raise ConfigError(f"{name}: {where}{_reason(error)}") from None
    try:
        resolved = OmegaConf.to_object(config)
    except MissingMandatoryValue as error:
        raise ConfigError(
            f"{path or 'configuration'}: {error.full_key} is not set; give it in the file or as "
            f"{error.full_key}=VALUE"
        ) from None
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path or 'configuration'}: {_reason(error)}") from None
    assert isinstance(resolved, Config)
    validate(resolved)
    return resolved


def to_dict(config: Config) -> dict[str, Any]:
    """Plain dictionary of a configuration, for config.json."""
    plain = OmegaConf.to_container(OmegaConf.structured(config))
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def save_config(config: Config, path: Path) -> None:
    """Write the resolved configuration as JSON."""
    path.write_text(json.dumps(to_dict(config), indent=2) + "\n")


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


def _read_layers(path: Path) -> list[tuple[str, DictConfig]]:
    """A file and the ones it builds on, the first base in front."""
    layers: list[tuple[str, DictConfig]] = []
    seen: list[Path] = []
    while True:
        if path.resolve() in seen:
            raise ConfigError(f"{path}: builds on itself; of {BASE} each file names another")
        seen.append(path.resolve())
        layer = _read_yaml(path)
        base = layer.pop(BASE, None)
        layers.insert(0, (str(path), layer))
        if base is None:
            return layers
        if not isinstance(base, str):
            raise ConfigError(f"{path}: {BASE} is {base!r}; expected the path of a YAML file")
        path = path.parent / base


def _read_yaml(path: Path) -> DictConfig:
    if not path.is_file():
        raise ConfigError(f"{path}: no such configuration file")
    if path.stat().st_size > MAX_YAML_BYTES:
        raise ConfigError(f"{path}: {path.stat().st_size} bytes, at most {MAX_YAML_BYTES}")
    try:
        read = OmegaConf.load(path)
    except Exception as error:  # yaml's own errors share no base with OmegaConf's
        raise ConfigError(f"{path}: not readable as YAML: {_reason(error)}") from None
    if not isinstance(read, DictConfig):
        raise ConfigError(f"{path}: expected a mapping of groups at the top, got a list or a value")
    return read


def _read_override(text: str) -> DictConfig:
    key, mark, value = text.partition("=")
    if not mark:
        raise ConfigError(f"override {text!r}: expected group.key=value, as seed=2")
    try:
        layer = OmegaConf.from_dotlist([text])
        if not value:  # "data.eval=" empties a text; OmegaConf alone would read a null
            OmegaConf.update(layer, key, "")
    except Exception as error:  # of yaml, of OmegaConf, of the encoding
        raise ConfigError(f"override {text[:200]!a}: {_reason(error)}") from None
    return layer


def _check_interpolations(layer: DictConfig, name: str) -> None:
    """Values from the environment are read; other keys' would multiply without a bound."""

    def texts(value: Any) -> Iterator[str]:
        if isinstance(value, dict):
            for key, inner in value.items():
                yield from (str(key), *texts(inner))
        elif isinstance(value, list):
            for inner in value:
                yield from texts(inner)
        else:
            yield str(value)

    for text in texts(OmegaConf.to_container(layer)):
        if "${" in _ENVIRONMENT.sub("", text):
            raise ConfigError(
                f"{name}: {text[:80]!a}: of interpolations only ${{oc.env:NAME}} and "
                "${oc.env:NAME,default} are read; write the value"
            )


def _reason(error: Exception) -> str:
    """An error in one line; of yaml's, what is wrong and where."""
    problem, mark = getattr(error, "problem", None), getattr(error, "problem_mark", None)
    if problem and mark is not None:
        return f"{' '.join(str(problem).split())}, line {mark.line + 1}"[:300]
    lines = str(error).splitlines() or [type(error).__name__]
    return ascii(lines[0])[1:-1][:300] if not lines[0].isprintable() else lines[0][:300]


def _unknown(key: str) -> str:
    near = difflib.get_close_matches(key, keys(), n=1, cutoff=0.0)
    return f"unknown key {key!r}; the nearest is {near[0]!r}"
