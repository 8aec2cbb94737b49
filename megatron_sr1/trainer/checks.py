"""What is known of a run before any process starts, checked by a start and by a dry run alike.

In: a configuration and the number of ranks. Out: warnings, or the error with which the run would
end after minutes of loading. What is not there yet is left out. Free of torch, unless the model is
a Megatron checkpoint or the run directory holds checkpoints.
"""

from __future__ import annotations

from pathlib import Path

from megatron_sr1.checkpoint.folders import latest_step, resolve_model
from megatron_sr1.checkpoint.mapping import matched_entries
from megatron_sr1.config import Config
from megatron_sr1.data.shards import ShardReader
from megatron_sr1.errors import ConfigError, DataError
from megatron_sr1.model.hf_config import HFConfig, read_hf_config
from megatron_sr1.planning.layout import check, configured
from megatron_sr1.records import Example
from megatron_sr1.rewards.user_reward import UserReward

NUM_READ = 8
"""First samples of a data set that are read and decoded."""
NUM_LOOKED_AT = 100
"""First samples that are searched for an image, where rollout.canary_bound needs one."""


def check_run(config: Config, num_ranks: int) -> list[str]:
    """Check everything that the shards, the model's shape and the configuration tell.

    Args:
        config: of the run.
        num_ranks: of the run; 0 where the launch decides.

    Returns:
        warnings, a sentence each.

    Raises:
        SR1Error: the run would end with it.
    """
    _check_output(config)
    replica = config.parallel.replica_size
    if num_ranks % replica:
        raise ConfigError(
            f"the layout needs a multiple of {replica} ranks (parallel.tensor x pipeline x "
            f"context), got {num_ranks}; change the layout or launch.num_processes"
        )
    hf_config = model_shape(config.model.path)
    if hf_config is not None:
        _check_shape(config, hf_config, num_ranks or replica)
    if config.stage != "sft":
        if num_ranks % config.rollout.tensor_parallel:
            raise ConfigError(
                f"rollout.tensor_parallel={config.rollout.tensor_parallel} does not divide the "
                f"{num_ranks} ranks; change it or launch.num_processes"
            )
        if config.reward.function:
            UserReward(config.reward.function)
    return [*_check_data(config, "train"), *_check_data(config, "eval")]


def model_shape(path: str) -> HFConfig | None:
    """Shape of the model in a directory of either kind, weights or none; None if it is not there.

    Raises:
        SR1Error: the directory is no model.
    """
    if not Path(path).exists():
        return None
    if (Path(path) / "config.json").is_file():
        return read_hf_config(path)
    return read_hf_config(resolve_model(path).hf_files)


def _check_output(config: Config) -> None:
    """Refuse a run directory that holds what this run would replace."""
    checkpoints = Path(config.output) / "checkpoints"
    if not checkpoints.is_dir():
        return
    if config.stage == "eval":
        raise ConfigError(
            f"{config.output} holds a training run, whose files an evaluation would replace; give "
            "another output"
        )
    step = latest_step(checkpoints)
    if step is not None and not config.checkpoint.resume:
        raise ConfigError(
            f"{checkpoints} holds a run up to step {step}, and checkpoint.resume=false would write "
            "over it; give another output"
        )


def _check_shape(config: Config, hf_config: HFConfig, num_ranks: int) -> None:
    """Refuse settings that do not fit the model's shape."""
    layout = configured(config, num_ranks)
    if layout is not None:
        check(hf_config, layout)
    matched_entries(hf_config, config.model.freeze)
    if config.stage == "sft":
        return
    rollout, text = config.rollout, hf_config.text
    if text.num_attention_heads % rollout.tensor_parallel:
        raise ConfigError(
            f"num_attention_heads is {text.num_attention_heads}, which rollout.tensor_parallel="
            f"{rollout.tensor_parallel} does not divide; use a divisor"
        )
    if rollout.max_model_len > text.max_position_embeddings:
        raise ConfigError(
            f"rollout.max_model_len={rollout.max_model_len}, but max_position_embeddings of the "
            f"model is {text.max_position_embeddings}; lower the first"
        )


def _check_data(config: Config, which: str) -> list[str]:
    """Check the shards of data.train or data.eval, as the stage uses them."""
    folder, is_train = getattr(config.data, which), which == "train"
    is_used = config.stage != "eval" if is_train else config.stage != "sft"
    if not is_used or not folder or not Path(folder).exists():
        return []
    reader = ShardReader(folder)
    if config.stage == "grpo" and is_train and len(reader) < config.data.prompts_per_step:
        raise ConfigError(
            f"data.prompts_per_step={config.data.prompts_per_step}, but {folder} has {len(reader)} "
            f"samples; a step must not hold a prompt twice: set data.prompts_per_step={len(reader)}"
            " or less, and algorithm.prompts_per_update to a divisor of it"
        )
    first = range(min(len(reader), NUM_READ))
    faults = [fault for index in first if (fault := _fault(reader, index, config))]
    if len(faults) == len(first):
        reason = faults[0] if faults else "there are none"
        raise DataError(
            f"data.{which}={folder}: none of the first {NUM_READ} samples can be used: {reason}"
        )
    if config.stage == "grpo" and is_train and config.rollout.canary_bound > 0:
        _check_canary(reader, folder)
    return [f"{fault}; the run will skip it" for fault in faults]


def _fault(reader: ShardReader, index: int, config: Config) -> str:
    """Why a sample cannot be used, "" if it can."""
    try:
        example = reader.example(index)
        reader.images(index)
    except DataError as error:
        return str(error)
    where = f"{example.shard} sample {example.key}"
    if config.stage != "sft" and example.answer is None:
        return f"{where} has no gold answer to judge by"
    if config.stage == "sft" and not _has_target(example):
        return f"{where} has no assistant turn to learn from"
    return ""


def _has_target(example: Example) -> bool:
    return any(message.role == "assistant" for message in example.messages)


def _check_canary(reader: ShardReader, folder: str) -> None:
    for index in range(min(len(reader), NUM_LOOKED_AT)):
        try:
            if reader.example(index).num_images:
                return
        except DataError:
            continue
    raise ConfigError(
        f"rollout.canary_bound needs a sample with an image among the first {NUM_LOOKED_AT} of "
        f"data.train, {folder} has none; set rollout.canary_bound=0"
    )
