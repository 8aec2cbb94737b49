"""The checks of a run before any process starts, and the description that a dry run prints.

In: a configuration and the number of ranks. Out: warnings, or the error that would stop the run
after minutes of loading; a start and `train --dry-run` make the same checks, of what exists.

torch and Megatron-Core take seconds to import. Only a model with weights imports them, to build its
classes as the ranks would; for a config.json alone the planner's formulas are used.
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from megatron_sr1.checkpoint.folders import latest_step, resolve_model
from megatron_sr1.checkpoint.mapping import adapter_entries, check_freeze
from megatron_sr1.checkpoint.peft_files import PeftAdapter
from megatron_sr1.config.run import Config
from megatron_sr1.data.prompts import template_texts
from megatron_sr1.errors import ConfigError
from megatron_sr1.model.hf_config import HFConfig, check_layout, read_hf_config
from megatron_sr1.observability.sinks import check_installed
from megatron_sr1.planning.layout import Layout, configured
from megatron_sr1.planning.memory import stage_parameters, static_memory
from megatron_sr1.planning.workload import num_parameters
from megatron_sr1.rewards.user_reward import UserReward
from megatron_sr1.runtime import hub
from megatron_sr1.runtime.chat import read_key
from megatron_sr1.trainer.data_checks import (
    check_set,
    check_training,
    describe_data,
    resolved,
    training_reader,
)


def dry_run(config: Config, lengths: Mapping[str, Sequence[int]]) -> str:
    """Describe a checked run: model, data, layout, steps, and what does not exist yet.

    `lengths` are those of prompts, by configuration key of their set.
    """
    config = resolved(config)
    hf_config = model_shape(config)
    step = latest_step(Path(config.output) / "checkpoints") if config.checkpoint.resume else None
    resumed = "" if step is None else f", resumed from step {step}"
    lines = [
        f"stage       {config.stage}, recipe {config.reward.recipe}, seed {config.seed}",
        f"output      {config.output}{resumed}",
        f"model       {_model(config, hf_config)}",
    ]
    if config.stage != "eval":
        for name, path in config.data.sets.items():
            share = f"{name} ({config.data.shares[name]:.0%} of a step): " if name else ""
            lines.append(f"train data  {share}{describe_data(path)}")
        lines += [f"prompts     {_lengths(key, each)}" for key, each in lengths.items() if each]
        lines.append(f"layout      {_layout(config)}")
        parameters = memory = "unknown without the model"
        if hf_config is not None:
            num_ranks = config.launch.num_processes or config.parallel.replica_size
            layout = configured(config, num_ranks)
            parameters = _parameters(config, hf_config, layout, num_ranks)
            memory = _memory(config, hf_config, layout)
        lines += [f"parameters  {parameters}", f"memory      {memory}"]
        lines += [f"steps       {_steps(config)}"]
    for name, each in config.evaluation.sets.items():
        lines.append(f"eval data   {name}: {describe_data(each.path)}")
    for key, endpoint in config.endpoints().items():
        lines.append(f"endpoint    {key}: {endpoint.model} at {endpoint.base_url}")
    if config.stage != "sft":
        if config.reward.function:
            is_total = config.reward.function_for == "total"
            does = "total reward given" if is_total else "answers judged"
            lines.append(f"reward      {does} by {config.reward.function}, loaded")
        rollout = config.rollout
        lines.append(
            f"engine      tensor parallel {rollout.tensor_parallel}, {rollout.max_num_seqs} slots "
            f"of {rollout.max_model_len} tokens, pass 2 {rollout.pass2}"
        )
    return "\n".join([*lines, *_prompts(config)])


def _prompts(config: Config) -> list[str]:
    """Show the prompts of the first sample, if the model's files and the data exist."""
    files, sets = hf_files(config), config.data.sets
    if config.stage == "eval":
        sets = {"": next(each.path for each in config.evaluation.sets.values())}
    if files is None or not (files / "tokenizer_config.json").is_file():
        return []
    if not all(path and Path(path).exists() for path in sets.values()):
        return []
    from megatron_sr1.trainer.preview import first_prompts  # imports torch

    return first_prompts(config, sets, files)


def _model(config: Config, hf_config: HFConfig | None) -> str:
    path, directory = config.model.path, local_model(config)
    if hf_config is None or directory is None:
        return f"{path}: does not exist, not checked"
    kind = "huggingface" if has_weights(directory) else "config.json alone"
    kind = kind if (directory / "config.json").is_file() else "megatron"
    commit = f" at {config.model.commit[:12]}" if directory != Path(path) else ""
    return (
        f"{path}{commit} ({kind}), {num_parameters(hf_config):,} parameters, "
        f"{hf_config.text.num_layers} text layers, {hf_config.vision.depth} vision blocks, "
        f"{config.model.dtype}, {config.model.spec} kernels"
    )


def local_model(config: Config) -> Path | None:
    """Return the local directory of the model, of a hub name without its weights; None if none."""
    try:
        path = hub.model_directory(*config.model.at, weights=False)
    except ConfigError:  # `preflight.fix_commit` reports it
        return None
    return path if path.exists() else None


def has_weights(directory: Path) -> bool:
    """Return True unless a Hugging Face directory holds its config.json alone."""
    return not (directory / "config.json").is_file() or any(directory.glob("*.safetensors"))


def _layout(config: Config) -> str:
    parallel = config.parallel
    text = f"tensor {parallel.tensor} x pipeline {parallel.pipeline} x context {parallel.context}"
    text += ", sequence parallel" if parallel.sequence else ""
    size, ranks = parallel.replica_size, config.launch.num_processes
    if not ranks:
        return f"{text} = {size} ranks per replica; the launch sets data parallelism"
    return f"{text} x data {ranks // size} = {ranks} ranks"


def _parameters(config: Config, hf_config: HFConfig, layout: Layout | None, num_ranks: int) -> str:
    """Describe the parameters of a rank at each end of the pipeline."""
    directory = local_model(config)
    if directory is not None and not has_weights(directory) and layout is not None:
        ranks = (0, layout.pipeline - 1)
        parts = [[stage_parameters(hf_config, layout, s) for s in layout.stages(r)] for r in ranks]
        first, last = (sum(p.numel for stage in part for p in stage) for part in parts)
    else:
        ends = (0, num_ranks - 1)
        first, last = (_built_parameters(config, hf_config, rank, num_ranks) for rank in ends)
    if config.parallel.pipeline == 1:
        return f"{first:,} on each rank"
    return f"{first:,} on a rank of the first stage, {last:,} of the last"


def _built_parameters(config: Config, hf_config: HFConfig, rank: int, num_ranks: int) -> int:
    """Count a rank's parameters by building Megatron's classes, without memory.

    They are built on torch's meta device, in a world whose other ranks do not exist (torch's
    backend "fake"), so that settings that Megatron refuses are found before a GPU is used. The
    kernels are this package's: Transformer Engine's hold the same parameters and need CUDA.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about missing libraries, which `doctor` reports
        import torch
        from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend

        from megatron_sr1.model.qwen25_vl import build_model
        from megatron_sr1.runtime.device import stop_distributed
        from megatron_sr1.runtime.groups import make_groups

        torch.distributed.init_process_group(
            "fake", store=FakeStore(), rank=rank, world_size=num_ranks
        )
        try:
            groups = make_groups(config.parallel, torch.device("cpu"), on_host=False)
            with torch.device("meta"):
                settings = replace(config.model, spec="local", fp8=None)
                chunks = build_model(hf_config, groups, settings, config.parallel)
            return sum(p.numel() for chunk in chunks for p in chunk.parameters())
        finally:
            stop_distributed()


def _memory(config: Config, hf_config: HFConfig, layout: Layout | None) -> str:
    """Describe what the fullest rank holds during the whole run; `megatron-sr1 plan` says more."""
    if layout is None:
        return "unknown: the layout does not divide the ranks"
    ranks = (static_memory(config, hf_config, layout, rank) for rank in layout.ends)
    held = max(ranks, key=lambda memory: memory.device)
    parts = {"weights": held.weights, "gradients": held.gradients, "optimizer": held.optimizer}
    text = " + ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items())
    host = f", {held.host / 1e9:.2f} GB in host memory" if held.host else ""
    return f"{text} GB on the fullest of {layout.num_ranks} ranks{host}"


def _lengths(key: str, lengths: Sequence[int]) -> str:
    """Describe the lengths of some prompts."""
    least, most, middle = min(lengths), max(lengths), statistics.median(lengths)
    return f"{len(lengths)} of {key}: {least:,} to {most:,} tokens, median {middle:,.0f}"


def _steps(config: Config) -> str:
    """Describe the length of the run, of its steps and of its warm-up."""
    data, optimizer, reader = config.data, config.optimizer, training_reader(config)
    each = f"updates of {data.prompts_per_step} sequences"
    if config.stage != "sft":
        each = f"of {data.prompts_per_step} prompts x {config.rollout.samples_per_prompt} responses"
        each += f", {config.updates_per_step} updates each"
    if optimizer.num_steps is None:  # without data
        text = f"unknown without the data (optimizer.num_epochs={optimizer.num_epochs:g}); {each}"
    else:
        text = f"{optimizer.num_steps:,} {each}"
        if reader is not None:
            epochs = optimizer.num_steps * data.prompts_per_step / len(reader)
            text += f", {epochs:.2f} epochs of {len(reader):,} samples"
    warmup = f"{optimizer.warmup_steps:,} updates" if optimizer.warmup_steps else ""
    if optimizer.warmup_ratio:
        warmup = f"{optimizer.warmup_ratio:.0%} of the updates"
    return f"{text}, warm-up over {warmup}" if warmup else text


def check_run(config: Config, num_ranks: int) -> list[str]:
    """Check a run by its shards, its model's shape and its configuration; return warnings.

    What would stop the run raises its SR1Error. `num_ranks` is 0 if the launch decides.
    """
    resolved(config)
    check_output(config)
    check_installed(config.logging)
    template_texts(config.data)  # raises if one cannot be used
    replica = config.parallel.replica_size
    if num_ranks % replica:
        raise ConfigError(
            f"the layout needs a multiple of {replica} ranks (parallel.tensor x pipeline x "
            f"context), got {num_ranks}; change the layout or launch.num_processes"
        )
    hf_config = model_shape(config)
    if hf_config is not None:
        _check_shape(config, hf_config)
    if config.stage != "sft":
        if num_ranks % config.rollout.tensor_parallel:
            raise ConfigError(
                f"rollout.tensor_parallel={config.rollout.tensor_parallel} does not divide the "
                f"{num_ranks} ranks; change it or launch.num_processes"
            )
        for function in dict.fromkeys(config.functions().values()):
            UserReward(function, config.reward if function == config.reward.function else None)
    for key, endpoint in config.endpoints().items():
        read_key(key, endpoint)
    found = [] if config.stage == "eval" else check_training(config)
    if config.stage != "sft":
        for name, each in config.evaluation.sets.items():
            found += check_set(config, f"evaluation.sets.{name}.path", each.path)
    return found


def model_shape(config: Config) -> HFConfig | None:
    """Return the shape of the model in a directory of either kind; None if it does not exist."""
    files = hf_files(config)
    return None if files is None else read_hf_config(files)


def hf_files(config: Config) -> Path | None:
    """Return the local directory of configuration and tokenizer; None if there is no model."""
    directory = local_model(config)
    if directory is None or (directory / "config.json").is_file():
        return directory
    return resolve_model(directory).hf_files


def check_output(config: Config) -> None:
    """Raise ConfigError if the run directory holds what this run would replace."""
    checkpoints = Path(config.output) / "checkpoints"
    if not checkpoints.is_dir():
        return
    if config.stage == "eval":
        raise ConfigError(
            f"{config.output} holds a training run, whose files an evaluation would replace; give "
            "another output directory"
        )
    step = latest_step(checkpoints)
    if step is not None and not config.checkpoint.resume:
        raise ConfigError(
            f"{checkpoints} holds a run up to step {step}, and checkpoint.resume=false would write "
            "over it; give another output directory"
        )


def _check_shape(config: Config, hf_config: HFConfig) -> None:
    """Raise ConfigError if settings do not fit the model's shape."""
    check_layout(hf_config, config.parallel)
    check_freeze(hf_config, config.model.freeze)
    if config.adapter.rank:
        _check_adapter(config, hf_config)
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


def _check_adapter(config: Config, hf_config: HFConfig) -> None:
    """Raise an error if adapters do not fit the model, the file they start from, or the engine."""
    modules = adapter_entries(hf_config, config.adapter.targets, config.adapter.rank)
    if config.adapter.path:
        PeftAdapter(config.adapter.path).check(config.adapter, modules)
    others = [name for name in modules if not name.startswith("model.layers.")]
    if config.rollout.lora == "engine" and others:
        raise ConfigError(
            "rollout.lora=engine serves adapters of the language model's layers, and "
            f"adapter.targets match {len(others)} other modules, as {others[0]}; set "
            "rollout.lora=merged, or targets that begin with ^model[.]layers[.]"
        )
