"""What a run would do, said without starting it: for `train --dry-run`.

torch and Megatron-Core take seconds to import. They are asked only where there is a whole model,
whose classes are then built as its ranks would; of a config.json alone, formulas tell as much as
they do to `megatron-sr1 plan`.
"""

from __future__ import annotations

import warnings
from math import prod
from pathlib import Path

from megatron_sr1.checkpoint.folders import latest_step
from megatron_sr1.checkpoint.mapping import entries
from megatron_sr1.config import Config
from megatron_sr1.data.shards import ShardReader
from megatron_sr1.model.hf_config import HFConfig
from megatron_sr1.planning.layout import configured
from megatron_sr1.planning.static_memory import stage_parameters, static_memory
from megatron_sr1.trainer.checks import NUM_READ, model_shape


def dry_run(config: Config) -> str:
    """Describe a run that was checked: model, data, layout, steps, and what is not there yet."""
    hf_config = model_shape(config.model.path)
    lines = [
        f"stage       {config.stage}, recipe {config.reward.recipe}, seed {config.seed}",
        f"output      {config.output}{_resumed(config)}",
        f"model       {_model(config, hf_config)}",
    ]
    if config.stage != "eval":
        lines += [f"train data  {_data(config.data.train)}", f"layout      {_layout(config)}"]
        lines += [f"parameters  {_parameters(config, hf_config)}"]
        lines += [f"memory      {_memory(config, hf_config)}", f"steps       {_steps(config)}"]
    if config.stage != "sft":
        if config.reward.function:
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
    if not config.checkpoint.resume or not checkpoints.is_dir():
        return ""
    step = latest_step(checkpoints)
    return "" if step is None else f", resumed from step {step}"


def _model(config: Config, hf_config: HFConfig | None) -> str:
    path = config.model.path
    if hf_config is None:
        return f"{path}: not there, not checked"
    count = sum(prod(shape) for entry in entries(hf_config) for shape in entry.hf_shapes)
    kind = "huggingface" if (Path(path) / "config.json").is_file() else "megatron"
    kind = kind if has_weights(path) else "config.json alone"
    return (
        f"{path} ({kind}), {count:,} parameters, {hf_config.text.num_layers} text layers, "
        f"{hf_config.vision.depth} vision blocks, {config.model.dtype}, {config.model.spec} kernels"
    )


def has_weights(path: str) -> bool:
    """Return True unless a Hugging Face directory holds its config.json alone."""
    folder = Path(path)
    return not (folder / "config.json").is_file() or any(folder.glob("*.safetensors"))


def _data(path: str) -> str:
    if not path:
        return "none"
    if not Path(path).exists():
        return f"{path}: not there, not checked"
    reader = ShardReader(path)
    return f"{path}, {len(reader):,} samples, first {min(len(reader), NUM_READ)} read"


def _layout(config: Config) -> str:
    parallel = config.parallel
    text = f"tensor {parallel.tensor} x pipeline {parallel.pipeline} x context {parallel.context}"
    text += ", sequence parallel" if parallel.sequence else ""
    model_size = config.parallel.replica_size
    ranks = config.launch.num_processes
    if not ranks:
        return f"{text} = {model_size} ranks a replica; data parallel is what the launch brings"
    return f"{text} x data {ranks // model_size} = {ranks} ranks"


def _num_ranks(config: Config) -> int:
    """As configured, or of one replica."""
    return config.launch.num_processes or config.parallel.replica_size


def _parameters(config: Config, hf_config: HFConfig | None) -> str:
    """Of a rank at each end of the pipeline, from the classes that would run, or by formula."""
    if hf_config is None:
        return "not known without the model"
    layout = configured(config, _num_ranks(config))
    if not has_weights(config.model.path) and layout is not None:
        ranks = (0, layout.pipeline - 1)
        parts = [[stage_parameters(hf_config, layout, s) for s in layout.stages(r)] for r in ranks]
        counts = [sum(p.numel for stage in part for p in stage) for part in parts]
    else:
        counts = _built_parameters(config, hf_config)
    if config.parallel.pipeline == 1:
        return f"{counts[0]:,} on each rank"
    return f"{counts[0]:,} on a rank of the first stage, {counts[1]:,} of the last"


def _built_parameters(config: Config, hf_config: HFConfig) -> list[int]:
    last = _num_ranks(config) - 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what is not installed; `doctor` tells
        from megatron_sr1.trainer.shapes import num_parameters_on  # imports Megatron-Core: seconds

        return [num_parameters_on(config, hf_config, rank, last + 1) for rank in (0, last)]


def _memory(config: Config, hf_config: HFConfig | None) -> str:
    """Of the fullest rank from the first step to the last; `megatron-sr1 plan` tells the rest."""
    if hf_config is None:
        return "not known without the model"
    layout = configured(config, _num_ranks(config))
    if layout is None:
        return "not known: the layout does not divide the ranks"
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
