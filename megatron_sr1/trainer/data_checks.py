"""Checks of the shards that a run reads, before any rank starts.

In: a configuration. Out: warnings, a description, or the error that would stop the run. Free of
torch, but for the lengths of prompts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from megatron_sr1.config.fields import LARGEST_INTEGER
from megatron_sr1.config.rules import with_steps
from megatron_sr1.config.run import Config
from megatron_sr1.data.shards import ShardReader, first_with_image
from megatron_sr1.errors import ConfigError, DataError

NUM_READ = 8
"""Samples of a data set that are read and decoded, the first ones."""
NUM_MEASURED = 64
"""Samples of a training set whose prompts a dry run tokenises, evenly spaced."""


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


def prompt_lengths(config: Config, hf_files: Path | None) -> dict[str, list[int]]:
    """Measure prompts, in SFT conversations, of the training sets; tokens, by configuration key.

    Samples that cannot be used are left out. Empty without all training sets, or if `hf_files`,
    the model's directory of configuration and tokenizer, holds no tokenizer.
    """
    reader = training_reader(config)
    if reader is None or hf_files is None or not (hf_files / "tokenizer_config.json").is_file():
        return {}
    from megatron_sr1.trainer.samples import Samples, make_processor

    processor = make_processor(config, hf_files)
    unlimited = replace(config.data, max_prompt_tokens=LARGEST_INTEGER)
    samples = Samples(replace(config, data=unlimited), config.data.sets, processor)
    read = samples.conversation if config.stage == "sft" else samples.prompt
    found: dict[str, list[int]] = {}
    first = 0
    for key, size in zip(config.data.paths, reader.sizes, strict=True):
        number, found[key] = min(size, NUM_MEASURED), []
        for place in range(number):
            with contextlib.suppress(DataError):
                found[key].append(len(read(first + place * size // number).token_ids))
            samples.forget()
        first += size
    return found


def long_prompts(config: Config, lengths: Mapping[str, Sequence[int]]) -> list[str]:
    """Return a warning for each training set with prompts that are too long for the run."""
    limit, found = config.data.max_prompt_tokens, []
    for key, measured in lengths.items():
        too_long = sum(length > limit for length in measured)
        if too_long:
            found.append(
                f"{key}={config.data.paths[key]}: {too_long} of {len(measured)} samples, evenly "
                f"spaced, are longer than data.max_prompt_tokens={limit} (at most "
                f"{max(measured):,} tokens); the run skips such samples, and stops after "
                f"data.max_skipped={config.data.max_skipped}: leave them out with "
                f"tools/make_shards.py --model {config.model.path} --config CONFIG "
                f"--max-prompt-tokens {limit}, raise the limit, or lower data.max_pixels"
            )
    return found
