"""What a run would do, said without starting it: for `train --dry-run`."""

from __future__ import annotations

import warnings
from pathlib import Path

from megatron_sr1.checkpoint.folders import latest_step, resolve_model
from megatron_sr1.checkpoint.mapping import entries
from megatron_sr1.config import Config
from megatron_sr1.data.shards import ShardReader
from megatron_sr1.errors import SR1Error
from megatron_sr1.model.hf_config import read_hf_config
from megatron_sr1.planning.layout import check, configured
from megatron_sr1.planning.memory import static_memory
from megatron_sr1.rewards.own import OwnReward


def dry_run(config: Config) -> str:
    """Describe a run: model, data, layout, steps. What is not there yet is said to be unchecked.

    Raises:
        SR1Error: what is there cannot be used.
    """
    lines = [
        f"stage       {config.stage}, recipe {config.reward.recipe}, seed {config.seed}",
        f"output      {config.output}{_resumed(config)}",
        f"model       {_model(config)}",
    ]
    if config.stage != "eval":
        lines += [f"train data  {_data(config.data.train)}", f"layout      {_layout(config)}"]
        lines += [f"parameters  {_parameters(config)}", f"memory      {_memory(config)}"]
        lines += [f"steps       {_steps(config)}"]
    if config.stage != "sft":
        if config.reward.function:
            OwnReward(config.reward.function)
            lines.append(f"reward      answers judged by {config.reward.function}, loaded")
        lines.append(f"eval data   {_data(config.data.eval)}")
        rollout = config.rollout
        lines.append(
            f"engine      tensor parallel {rollout.tensor_parallel}, "
            f"{rollout.max_num_seqs} slots of {rollout.max_model_len} tokens, pass 2 "
            f"{rollout.pass2}"
        )
    return "\n".join(lines)


def _resumed(config: Config) -> str:
    checkpoints = Path(config.output) / "checkpoints"
    step = latest_step(checkpoints) if config.checkpoint.resume else None
    return "" if step is None else f", resumed from step {step}"


def _model(config: Config) -> str:
    path = config.model.path
    if not Path(path).exists():
        return f"{path}: not there, not checked"
    source = resolve_model(path)
    hf_config = read_hf_config(source.hf_files)
    count = 0
    for entry in entries(hf_config):
        for shape in entry.hf_shapes:
            size = 1
            for extent in shape:
                size *= extent
            count += size
    return (
        f"{path} ({source.kind}), {count:,} parameters, {hf_config.text.num_layers} text layers, "
        f"{hf_config.vision.depth} vision blocks, {config.model.dtype}, {config.model.spec} kernels"
    )


def _data(path: str) -> str:
    if not path:
        return "none"
    if not Path(path).exists():
        return f"{path}: not there, not checked"
    reader = ShardReader(path)
    for index in range(min(len(reader), 8)):
        reader.images(index)
    return f"{path}, {len(reader):,} samples, first {min(len(reader), 8)} read"


def _layout(config: Config) -> str:
    parallel = config.parallel
    text = f"tensor {parallel.tensor} x pipeline {parallel.pipeline} x context {parallel.context}"
    text += ", sequence parallel" if parallel.sequence else ""
    model_size = parallel.tensor * parallel.pipeline * parallel.context
    ranks = config.launch.num_processes
    if not ranks:
        return f"{text} = {model_size} ranks a replica; data parallel is what the launch brings"
    if ranks % model_size:
        raise SR1Error(f"the layout needs a multiple of {model_size} ranks, got {ranks}")
    return f"{text} x data {ranks // model_size} = {ranks} ranks"


def _num_ranks(config: Config) -> int:
    """As configured, or of one replica."""
    parallel = config.parallel
    replica = parallel.tensor * parallel.pipeline * parallel.context
    return config.launch.num_processes or replica


def _parameters(config: Config) -> str:
    """Of a rank at each end of the pipeline, from the classes that would run."""
    if not Path(config.model.path).exists():
        return "not known without the model"
    hf_config = read_hf_config(resolve_model(config.model.path).hf_files)
    last = _num_ranks(config) - 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what is not installed; `doctor` tells
        from megatron_sr1.trainer.shapes import num_parameters_on  # imports Megatron-Core: seconds

        counts = [num_parameters_on(config, hf_config, rank, last + 1) for rank in (0, last)]
    if config.parallel.pipeline == 1:
        return f"{counts[0]:,} on each rank"
    return f"{counts[0]:,} on a rank of the first stage, {counts[1]:,} of the last"


def _memory(config: Config) -> str:
    """Of the fullest rank from the first step to the last; `megatron-sr1 plan` tells the rest."""
    if not Path(config.model.path).exists():
        return "not known without the model"
    hf_config = read_hf_config(resolve_model(config.model.path).hf_files)
    layout = configured(config, _num_ranks(config))
    if layout is None:
        return "not known: the layout does not divide the ranks"
    check(hf_config, layout)
    held = max(
        (static_memory(config, hf_config, layout, rank) for rank in layout.ends),
        key=lambda h: h.device,
    )
    parts = {"weights": held.weights, "gradients": held.gradients, "optimizer": held.optimizer}
    text = " + ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items())
    host = f", {held.host / 1e9:.2f} GB in host memory" if held.host else ""
    return f"{text} GB on the fullest of {layout.num_ranks} ranks{host}"


def _steps(config: Config) -> str:
    steps, data = config.optimizer.num_steps, config.data
    if config.stage == "sft":
        return f"{steps} updates of {data.prompts_per_step} sequences"
    updates = data.prompts_per_step // config.algorithm.prompts_per_update
    return (
        f"{steps} of {data.prompts_per_step} prompts x {config.rollout.samples_per_prompt} "
        f"responses, {updates} updates each"
    )
