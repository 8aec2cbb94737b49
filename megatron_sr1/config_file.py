"""Reading the configuration: YAML files and overrides over the defaults, by OmegaConf.

YAML files hold differences; `group.key=value` overrides come last. An unknown key or an impossible
value is a `ConfigError` that names the nearest valid one.
"""

from __future__ import annotations

import difflib
import json
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
    "model.fp8_recipe": ("delayed", "tensorwise", "blockwise", "mxfp8"),
    "model.recompute": ("none", "selective", "full"),
    "data.prompt_style": ("full", "brief"),
    "rollout.pass2": ("fork", "barrier"),
    "reward.recipe": ("vision_sr1", "see_think", "vision_r1"),
    "algorithm.advantage": ("grpo", "dr_grpo", "rloo"),
    "algorithm.credit": ("scalar", "component", "span"),
    "algorithm.loss": ("token_mean", "sequence_mean", "dr_grpo", "gspo"),
    "algorithm.importance_sampling": ("off", "token", "sequence"),
    "optimizer.schedule": ("constant", "linear", "cosine"),
    "logging.level": ("debug", "info", "warning"),
    "logging.wandb": ("off", "offline", "online"),
    "launch.device": ("auto", "cpu", "cuda"),
}
AT_LEAST_ONE = (
    "parallel.tensor",
    "parallel.pipeline",
    "parallel.context",
    "data.prompts_per_step",
    "data.pack_tokens",
    "rollout.tensor_parallel",
    "rollout.samples_per_prompt",
    "rollout.max_response_tokens",
    "rollout.max_reading_tokens",
    "algorithm.prompts_per_update",
    "algorithm.importance_cap",
    "algorithm.max_refills",
    "model.logprob_chunk_tokens",
)

ABOVE_ZERO = (
    "rollout.temperature",
    "algorithm.std_floor",
    "algorithm.answer_weight",
    "algorithm.visual_weight",
    "reward.grader_timeout_seconds",
    "optimizer.learning_rate",
)
NOT_NEGATIVE = (
    "algorithm.format_share",
    "algorithm.mask_beyond_nats",
    "algorithm.gspo_clip_low",
    "algorithm.gspo_clip_high",
)


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
        path: YAML file with differences from the defaults; None for none.
        overrides: dotted assignments, later ones win.

    Returns:
        the validated configuration.

    Raises:
        ConfigError: file absent or not a mapping, unknown key, wrong type or impossible value.
    """
    config = OmegaConf.structured(Config)
    layers: list[tuple[str, Any]] = []
    if path is not None:
        layers.append((str(path), _read_yaml(Path(path))))
    for text in overrides or []:
        if "=" not in text:
            raise ConfigError(f"override {text!r}: expected group.key=value, as seed=2")
        layer = OmegaConf.from_dotlist([text])
        key, _, value = text.partition("=")
        if not value:  # "data.eval=" empties a text; OmegaConf alone would read a null
            OmegaConf.update(layer, key, "")
        layers.append((text, layer))
    for name, layer in layers:
        try:
            config = OmegaConf.merge(config, layer)
        except ConfigKeyError as error:
            raise ConfigError(f"{name}: {_unknown(error.full_key or str(error.key))}") from None
        except OmegaConfBaseException as error:
            reason = str(error).split("\n")[0]
            raise ConfigError(f"{name}: key {error.full_key!r}: {reason}") from None
    try:
        resolved = OmegaConf.to_object(config)
    except MissingMandatoryValue as error:
        raise ConfigError(
            f"{path or 'configuration'}: {error.full_key} is not set; give it in the file or as "
            f"{error.full_key}=VALUE"
        ) from None
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path or 'configuration'}: {str(error).splitlines()[0]}") from None
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
    for key in AT_LEAST_ONE:
        if _get(config, key) < 1:
            raise ConfigError(f"{key} is {_get(config, key)}; expected 1 or more")
    if config.parallel.sequence and config.parallel.tensor == 1:
        raise ConfigError("parallel.sequence=true needs parallel.tensor of 2 or more")
    if config.model.fp8 and config.model.spec != "transformer_engine":
        raise ConfigError("model.fp8 needs model.spec=transformer_engine")
    for key in ABOVE_ZERO:
        if _get(config, key) <= 0:
            raise ConfigError(f"{key} is {_get(config, key)}; expected more than 0")
    for key in NOT_NEGATIVE:
        if _get(config, key) < 0:
            raise ConfigError(f"{key} is {_get(config, key)}; expected 0 or more")
    if config.stage != "sft":
        _validate_rollout(config)


def _validate_rollout(config: Config) -> None:
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


def _read_yaml(path: Path) -> DictConfig:
    if not path.is_file():
        raise ConfigError(f"{path}: no such configuration file")
    try:
        read = OmegaConf.load(path)
    except Exception as error:  # yaml's own errors share no base with OmegaConf's
        raise ConfigError(f"{path}: not readable as YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(read, DictConfig):
        raise ConfigError(f"{path}: expected a mapping of groups at the top, got a list or a value")
    return read


def _unknown(key: str) -> str:
    near = difflib.get_close_matches(key, keys(), n=1, cutoff=0.0)
    return f"unknown key {key!r}; the nearest is {near[0]!r}"
