"""The text that `megatron-sr1 plan` prints."""

from __future__ import annotations

from megatron_sr1.config.run import Config
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
from megatron_sr1.planning.workload import PlannedRun, Workload
from megatron_sr1.runtime.gpus import Gpu

NUM_SHOWN = 8
"""Layouts that are listed."""


def plan_page(config: Config, hf_config: HFConfig, gpu: Gpu, num_gpus: int, work: Workload) -> str:
    """Return the plan of a run on `num_gpus` GPUs, all of which are used.

    Raises:
        ConfigError: nothing fits, nothing is trained, or the GPUs are not whole nodes.
    """
    if config.stage == "eval":
        raise ConfigError("stage=eval trains nothing, so it has no layout to plan; use sft or grpo")
    run = PlannedRun(config, hf_config, gpu, work)
    found = estimates(run, num_gpus)
    best = choose(found)
    if best is None:
        raise nothing_fits(run, num_gpus, found)
    fitting = [e for e in found if e.fits]
    lines = [
        f"model     {config.model.path}, {num_parameters(hf_config):,} parameters, "
        f"{config.model.dtype}",
        f"cluster   {num_gpus} x {gpu.name}, {gpu.memory_bytes / 1e9:.0f} GB each",
        f"a step    {work} (assumed; --help lists the options that set lengths)",
        "",
        *_own_lines(run, num_gpus),
        f"layouts   {len(fitting)} of {len(found)} fit, the fastest:",
        *(f"  {_line(e)}" for e in fitting[:NUM_SHOWN]),
        "",
        f"proposed: {best.layout}, engine {best.layout.engine}; GB on the fullest GPU:",
        *_memory_lines(best),
        "",
        "time of a step by phase (without reading data and grading):",
        *_phase_lines(best),
        *_variant_lines(run, best),
        "",
        "as configuration keys:",
        *(f"  {text}" for text in best.layout.overrides(config)),
    ]
    return "\n".join(lines)


def _memory_lines(found: Estimate) -> list[str]:
    """Memory of the fullest rank by kind."""
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
        "total, training": memory.training,
    }
    if memory.rollout:
        kinds |= {
            "engine weights": memory.engine_weights,
            "engine KV cache": memory.cache,
            "total, rollout": memory.rollout,
        }
    if memory.static.host:
        kinds["optimizer in host memory"] = memory.static.host
    return [f"  {name:<26}{value / 1e9:8.1f}" for name, value in kinds.items()]


def _phase_lines(found: Estimate) -> list[str]:
    """Seconds and MFU by phase."""
    seconds = {**found.seconds, "step": found.step_seconds}
    return [
        f"  {name:<14}{value:9.1f} s{100 * found.mfu[name]:7.1f} % MFU"
        for name, value in seconds.items()
    ]


def _line(found: Estimate, name: str = "") -> str:
    memory = f"{found.memory.peak / 1e9:5.1f} GB"
    seconds = f"{found.step_seconds:8.1f} s" if found.fits else " " * 10
    return f"{seconds}  {memory}  {name or f'{found.layout}, engine {found.layout.engine}'}"


def _own_lines(run: PlannedRun, num_gpus: int) -> list[str]:
    """The layout that the configuration names, whether it fits or not."""
    layout = configured(run.config, num_gpus)
    if layout is None:
        return ["the configuration's own layout does not divide these GPUs", ""]
    try:
        check(run.hf_config, layout)
    except ConfigError as error:
        return [f"the configuration's own layout does not divide this model: {error}", ""]
    own = estimate(run, layout)
    verdict = "fits" if own.fits else "does not fit"
    return [f"the configuration's own layout {verdict}:", f"  {_line(own)}", ""]


def _variant_lines(run: PlannedRun, best: Estimate) -> list[str]:
    """Variants of the proposal as keys; those that do not fit have no time."""
    proposed, lines = cut_keys(best.layout), []
    for other in variants(run, best.layout):
        keys = [f"{k}={v}" for k, v in cut_keys(other.layout).items() if v != proposed[k]]
        lines.append(f"  {_line(other, ' '.join(keys))}")
    return ["", "the same layout with other keys (no time: does not fit):", *lines] if lines else []
