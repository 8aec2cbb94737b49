"""The plan as text: what `megatron-sr1 plan` prints.

In: a configuration, a model's shape, a GPU's name and how many. Out: lines.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_sr1.config import Config
from megatron_sr1.errors import ConfigError
from megatron_sr1.model.hf_config import HFConfig
from megatron_sr1.planning.costs import RESERVED_BYTES
from megatron_sr1.planning.estimate import (
    Estimate,
    choose,
    estimate,
    estimates,
    nothing_fits,
    variants,
)
from megatron_sr1.planning.layout import check, configured, cut_keys
from megatron_sr1.planning.static_memory import num_parameters
from megatron_sr1.planning.workload import Workload
from megatron_sr1.runtime.gpus import Gpu

NUM_SHOWN = 8


def plan_page(config: Config, hf_config: HFConfig, gpu: Gpu, num_gpus: int, work: Workload) -> str:
    """The whole plan.

    Args:
        config: of the run.
        hf_config: shape of the model.
        gpu: of the cluster.
        num_gpus: all of them are used.
        work: a step's sequences.

    Raises:
        ConfigError: nothing fits, nothing is trained, or that many GPUs are no whole machines.
    """
    if config.stage == "eval":
        raise ConfigError("stage=eval trains nothing, so it has no layout to plan; use sft or grpo")
    found = estimates(config, hf_config, gpu, num_gpus, work)
    best = choose(found)
    if best is None:
        raise nothing_fits(found, config, hf_config, gpu, num_gpus, work)
    fitting = [e for e in found if e.fits]
    lines = [
        f"model     {config.model.path}, {num_parameters(hf_config):,} parameters, "
        f"{config.model.dtype}",
        f"cluster   {num_gpus} x {gpu.name}, {gpu.memory_bytes / 1e9:.0f} GB each",
        f"a step    {work} (assumed; --help tells how to set lengths)",
        "",
        *_own(config, hf_config, gpu, num_gpus, work),
        f"layouts   {len(fitting)} of {len(found)} fit, the fastest:",
        *(f"  {_line(e)}" for e in fitting[:NUM_SHOWN]),
        "",
        f"proposed: {best.layout}, engine {best.layout.engine}; GB on the fullest GPU:",
        *memory_lines(best),
        "",
        "its step by phase (reading data and grading are not in it):",
        *phase_lines(best),
        *_variants(config, hf_config, gpu, best, work),
        "",
        "as configuration keys:",
        *(f"  {text}" for text in best.layout.overrides(config)),
    ]
    return "\n".join(lines)


def memory_lines(found: Estimate) -> list[str]:
    """A rank's memory by kind, the fullest rank's."""
    memory = found.memory
    kinds = {
        "weights": memory.static.weights,
        "gradients": memory.static.gradients,
        "optimizer": memory.static.optimizer,
        "text activations": memory.text,
        "vision activations": memory.vision,
        "recomputed layer": memory.recomputed,
        "logits": memory.logits,
        "reserved": RESERVED_BYTES,
        "in all, training": memory.training,
    }
    if memory.rollout:
        kinds |= {
            "engine weights": memory.engine_weights,
            "engine KV cache": memory.cache,
            "in all, rollout": memory.rollout,
        }
    if memory.static.host:
        kinds["optimizer in host memory"] = memory.static.host
    return [f"  {name:<26}{value / 1e9:8.1f}" for name, value in kinds.items()]


def phase_lines(found: Estimate) -> list[str]:
    """Seconds and MFU by phase."""
    lines = [
        f"  {name:<14}{seconds:9.1f} s{100 * found.mfu[name]:7.1f} % MFU"
        for name, seconds in found.seconds.items()
    ]
    step = f"  {'step':<14}{found.step_seconds:9.1f} s{100 * found.mfu['step']:7.1f} % MFU"
    return [*lines, step]


def _line(found: Estimate, name: str = "") -> str:
    memory = f"{found.memory.most / 1e9:5.1f} GB"
    seconds = f"{found.step_seconds:8.1f} s" if found.fits else " " * 10
    return f"{seconds}  {memory}  {name or f'{found.layout}, engine {found.layout.engine}'}"


def _own(
    config: Config, hf_config: HFConfig, gpu: Gpu, num_gpus: int, work: Workload
) -> Sequence[str]:
    """The configuration's own layout, whether it fits or not."""
    layout = configured(config, num_gpus)
    if layout is None:
        return ["the configuration's own layout does not divide these GPUs", ""]
    try:
        check(hf_config, layout)
    except ConfigError as error:
        return [f"the configuration's own layout does not divide this model: {error}", ""]
    own = estimate(config, hf_config, layout, gpu, work)
    verdict = "fits" if own.fits else "does not fit"
    return [f"the configuration's own layout {verdict}:", f"  {_line(own)}", ""]


def _variants(
    config: Config, hf_config: HFConfig, gpu: Gpu, best: Estimate, work: Workload
) -> Sequence[str]:
    """The proposal cut in other ways, as keys; without a time what does not fit."""
    proposed, lines = cut_keys(best.layout), []
    for other in variants(config, hf_config, best.layout, gpu, work):
        keys = [f"{k}={v}" for k, v in cut_keys(other.layout).items() if v != proposed[k]]
        lines.append(f"  {_line(other, ' '.join(keys))}")
    return ["", "the same with other keys (no time: does not fit):", *lines] if lines else []
