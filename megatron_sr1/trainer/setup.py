"""From a configuration to live parts: device, groups, processor, actor, engine, scorer."""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_sr1.checkpoint.folders import ModelSource, resolve_model
from megatron_sr1.checkpoint.hf import check_tensors, save_hf
from megatron_sr1.checkpoint.hf_files import HFSource
from megatron_sr1.checkpoint.loading import load_model
from megatron_sr1.config.run import Config, LaunchConfig
from megatron_sr1.data.processor import Processor
from megatron_sr1.model.hf_config import HFConfig, read_hf_config
from megatron_sr1.model.qwen25_vl import build_model
from megatron_sr1.rewards.score import Scorer
from megatron_sr1.rollout.engine import Engine
from megatron_sr1.runtime import cpu, failure
from megatron_sr1.runtime.device import Device, select_device, start_distributed
from megatron_sr1.runtime.groups import Groups, make_groups
from megatron_sr1.runtime.rng import seed_everything
from megatron_sr1.trainer.samples import Samples

ONEDNN_KERNELS = 32
"""Kept by oneDNN, instead of its 1,024: packed samples bring new shapes in every step, and host
memory grows for hundreds of steps. A step takes as long: one layer's shapes serve all layers."""


def start_ranks(config: Config) -> tuple[Device, Groups]:
    """Start torch.distributed and make the layout's groups."""
    device = select_device(config.launch.device)
    if device.kind == "cpu":
        torch.set_num_threads(threads_a_rank(config.launch))
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(ONEDNN_KERNELS))
    start_distributed(device, collective_timeout_seconds(config.launch))
    failure.see_others()
    groups = make_groups(config.parallel, device)
    seed_everything(config.seed, groups)
    return device, groups


def collective_timeout_seconds(launch: LaunchConfig) -> float:
    """Time limit of a collective: above every deadline, so that the watch ends a hang and names it.

    Without deadlines a month.
    """
    longest = max(launch.setup_deadline_seconds, launch.phase_deadline_seconds)
    return longest + 60.0 if longest > 0 else 30 * 86400.0


def threads_a_rank(launch: LaunchConfig) -> int:
    """Threads of each rank on a CPU."""
    if launch.threads:
        return launch.threads
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, (os.cpu_count() or 1) // ranks)


def load_actor_model(config: Config, groups: Groups) -> tuple[list[Any], HFConfig, ModelSource]:
    """Build the model under the groups' layout and load `model.path` into it.

    Returns:
        the chunks, the model's shape, and where it came from.
    """
    source = resolve_model(config.model.path)
    hf_config = read_hf_config(source.hf_files)
    with cpu.megatron_mode():
        chunks = build_model(hf_config, groups, config.model, config.parallel)
        load_model(chunks, source, hf_config, groups, config.checkpoint.verify)
    return chunks, hf_config, source


def engine_directory(config: Config, groups: Groups) -> Path:
    """A Hugging Face directory with the weights of `model.path`, for the engine to start from.

    A Megatron checkpoint is exported into the run directory, once a checkpoint.

    Raises:
        CheckpointError: the weights are not those that its config.json describes.
    """
    source = resolve_model(config.model.path)
    if source.kind == "huggingface":
        check_tensors(HFSource(source.weights), read_hf_config(source.hf_files))
        return source.weights
    name = hashlib.blake2b(str(source.weights.resolve()).encode(), digest_size=6).hexdigest()
    target = Path(config.output) / "engine_start" / name
    if not (target / "config.json").is_file():
        chunks, hf_config, _ = load_actor_model(config, groups)
        save_hf(chunks, hf_config, groups, source.hf_files, target)
    dist.barrier(group=groups.world.process_group)
    return target


def make_processor(config: Config) -> Processor:
    """Tokenizer and image processor of `model.path`."""
    directory = resolve_model(config.model.path).hf_files
    return Processor(directory, config.data.min_pixels, config.data.max_pixels)


def open_samples(config: Config, directory: str, processor: Processor) -> Samples:
    """A folder of shards under this configuration."""
    return Samples(
        directory,
        processor,
        recipe=config.reward.recipe,
        style=config.data.prompt_style,
        pass2_order=config.rollout.pass2_order,
        max_prompt_tokens=config.data.max_prompt_tokens,
    )


def make_engine(config: Config, directory: Path, processor: Processor, device: Device) -> Engine:
    """The colocated rollout engine with the weights of a Hugging Face directory."""
    return Engine(
        directory,
        config.rollout,
        processor,
        device_kind=device.kind,
        dtype=config.model.dtype,
        seed=config.seed,
    )


def make_scorer(config: Config, recipe: str | None = None) -> Scorer:
    """Grader of a recipe, by default the configured one."""
    return Scorer(replace(config.reward, recipe=recipe or config.reward.recipe))
