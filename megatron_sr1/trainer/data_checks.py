"""Checks of the shards that a run reads, before any rank starts. Free of torch.

In: a configuration. Out: warnings, a description, or the error that would stop the run.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_sr1.config.rules import with_steps
from megatron_sr1.config.run import Config
from megatron_sr1.data.shards import ShardReader, first_with_image
from megatron_sr1.errors import ConfigError, DataError

NUM_READ = 8
"""Samples of a data set that are read and decoded, the first ones."""


def describe_data(path: str) -> str:
    """Describe a directory of shards in one line."""
    if not path:
        return "none"
    if not Path(path).exists():
        return f"{path}: does not exist, not checked"
    reader = ShardReader(path)
    return f"{path}, {len(reader):,} samples, first {min(len(reader), NUM_READ)} read"


def training_reader(config: Config) -> ShardReader | None:
    """Open all training sets; None without training, or if one of them does not exist."""
    paths = config.data.sets.values()
    is_there = config.stage != "eval" and all(path and Path(path).exists() for path in paths)
    return ShardReader(*paths) if is_there else None


def resolved(config: Config) -> Config:
    """Return the configuration with its epochs as steps, if the training sets exist."""
    reader = training_reader(config)
    return config if reader is None else with_steps(config, len(reader))


def check_training(config: Config) -> list[str]:
    """Check the training sets that exist, as the stage uses them; return warnings."""
    reader = training_reader(config)
    if reader is not None:
        check_sizes(config, reader.sizes)
    found = [
        text for key, path in config.data.paths.items() for text in check_set(config, key, path)
    ]
    if reader is not None and config.stage == "grpo" and config.rollout.canary_bound > 0:
        first_with_image(reader.sizes, lambda index: reader.example(index).num_images)
    return found


def check_sizes(config: Config, sizes: Sequence[int]) -> None:
    """Raise ConfigError if a step would hold a prompt twice.

    In SFT, a single set may have fewer samples than a step: each then occurs several times in it.
    """
    data, num_samples = config.data, sum(sizes)
    per_step, advice = data.prompts_per_step, "a step must not hold a prompt twice"
    for (name, share), size in zip(data.shares.items(), sizes, strict=True):
        wanted = round(per_step * share)
        if name and wanted > size:
            raise ConfigError(
                f"data.mixture.{name}.weight={data.mixture[name].weight:g} is {wanted} of a step's "
                f"data.prompts_per_step={per_step}, but {data.mixture[name].path} has {size} "
                f"samples; {advice}: lower the weight or data.prompts_per_step"
            )
    if config.stage == "grpo" and num_samples < per_step:
        raise ConfigError(
            f"data.prompts_per_step={per_step}, but {', '.join(data.sets.values())} has "
            f"{num_samples} samples; {advice}: set data.prompts_per_step={num_samples} or less, "
            "and algorithm.prompts_per_update to a divisor of it"
        )


def check_set(config: Config, key: str, directory: str) -> list[str]:
    """Read the first samples of a training or held-out set, if it exists; return warnings.

    Raises:
        DataError: none of them can be used.
    """
    if not directory or not Path(directory).exists():
        return []
    reader = ShardReader(directory)
    first = range(min(len(reader), NUM_READ))
    faults = [fault for index in first if (fault := _fault(reader, index, config))]
    if len(faults) == len(first):
        reason = faults[0] if faults else "there are none"
        raise DataError(
            f"{key}={directory}: none of the first {NUM_READ} samples can be used: {reason}"
        )
    return [f"{fault}; the run will skip it" for fault in faults]


def _fault(reader: ShardReader, index: int, config: Config) -> str:
    """Return why a sample cannot be used; "" if it can."""
    try:
        example = reader.example(index)
        reader.images(index)
    except DataError as error:
        return str(error)
    if config.stage != "sft" and example.answer is None:
        return f"{example.where} has no gold answer to judge by"
    if config.stage == "sft" and all(turn.role != "assistant" for turn in example.messages):
        return f"{example.where} has no assistant turn to learn from"
    return ""
