"""The plan of a run in words: layouts that fit, the one to propose and why, its variants.

In: a run on a type of GPU and a number of them. Out: the text of `megatron-sr1 plan`, or the error
that says what does not fit and what would.
"""

from __future__ import annotations

from dataclasses import replace

from megatron_sr1.config.adapter import AdapterConfig
from megatron_sr1.errors import ConfigError
from megatron_sr1.model.hf_config import check_layout
from megatron_sr1.planning.costs import RESERVED_BYTES
from megatron_sr1.planning.estimates import (
    NEARLY,
    Estimate,
    choose,
    estimate,
    estimates,
    tightness,
    variants,
)
from megatron_sr1.planning.layout import configured, cut_keys
from megatron_sr1.planning.memory import checkpoint_bytes
from megatron_sr1.planning.workload import PlannedRun, num_parameters
from megatron_sr1.runtime.gpus import GPUS_PER_NODE

MAX_GPUS = 4096
"""Largest cluster that the search for a sufficient one tries."""
SPLITS = ("context-parallel", "pipeline", "tensor-parallel")
NUM_SHOWN = 8
"""Layouts that are listed."""


def plan(run: PlannedRun, num_gpus: int) -> str:
    """Return the text that `megatron-sr1 plan` prints, for a run that uses all GPUs.

    Raise a ConfigError if nothing fits, nothing is trained, or the GPUs are not whole nodes.
    """
    config, gpu = run.config, run.gpu
    if config.stage == "eval":
        raise ConfigError("stage=eval trains nothing, so it has no layout to plan; use sft or grpo")
    found = estimates(run, num_gpus)
    best, needed = choose(found), []
    if best is None and can_make_room(run):
        run = with_room(run)
        config, found = run.config, estimates(run, num_gpus)
        best, needed = choose(found), [f"rollout.make_room={run.config.rollout.make_room}"]
        needed += [f"rollout.sleep_level={run.config.rollout.sleep_level}"]
    if best is None:
        raise _nothing_fits(run, num_gpus, found)
    fitting = [e for e in found if e.fits]
    lines = [
        f"model     {config.model.path}, {num_parameters(run.hf_config):,} parameters, "
        f"{config.model.dtype}",
        f"cluster   {num_gpus} x {gpu.name}, {gpu.memory_bytes / 1e9:.0f} GB each",
        f"a step    {_lengths(run)} (assumed; --help lists the options that set lengths)",
        f"steps     {_steps(run)}",
        "",
        *_own_lines(run, num_gpus),
        f"layouts   {len(fitting)} of {len(found)} fit, the fastest:",
        *(f"  {e.line()}" for e in fitting[:NUM_SHOWN]),
        "",
        f"proposed: {best.layout}, engine {best.layout.engine}",
        *_reasons(best, fitting[0], needed),
        "",
        "GB on the fullest GPU:",
        *_memory_lines(run, best),
        "",
        "time of a step by phase (without reading data and grading):",
        *(
            f"  {name:<14}{seconds:9.1f} s{100 * best.mfu[name]:7.1f} % MFU"
            for name, seconds in [*best.seconds.items(), ("step", best.step_seconds)]
        ),
        *_variant_lines(run, best),
        "",
        "as configuration keys:",
        *(f"  {text}" for text in [*best.layout.overrides(config), *needed]),
    ]
    return "\n".join(lines)


def can_make_room(run: PlannedRun) -> bool:
    """Return True if frozen weights beside the awake engine could still leave the GPU."""
    return run.has_rollouts and bool(run.adapters) and run.config.rollout.make_room != "weights"


def with_room(run: PlannedRun) -> PlannedRun:
    """Return the run with frozen weights in host memory while the engine is awake, and asleep else.

    Either sleep level frees the engine's memory: 1 keeps its weights in host memory, 2 drops them.
    """
    rollout = run.config.rollout
    rollout = replace(rollout, make_room="weights", sleep_level=rollout.sleep_level or 2)
    return replace(run, config=replace(run.config, rollout=rollout))


def _reasons(best: Estimate, fastest: Estimate, needed: list[str]) -> list[str]:
    """Why the proposal is not the fastest layout, and what it needs in order to fit."""
    lines = []
    if needed:
        lines.append(f"  no layout fits with the configuration's settings; this needs {needed[0]}")
    splits = best.layout.splits, fastest.layout.splits
    for what, own, other in zip(SPLITS, *splits, strict=True):
        if own != other:
            slower = 100 * (best.step_seconds / fastest.step_seconds - 1)
            return [
                *lines,
                f"  {slower:.1f} % slower than the fastest, with {own} instead of {other} {what} "
                f"ranks: below {100 * NEARLY:.0f} %, the formulas do not decide, as they leave out "
                "the overhead of small kernels",
            ]
    return lines


def _nothing_fits(run: PlannedRun, num_gpus: int, found: list[Estimate]) -> ConfigError:
    """Return the error that names the smallest layout and a sufficient number of GPUs."""
    nearest = "no layout divides the model"
    if found:
        smallest, gigabytes = found[0].layout, found[0].memory.peak / 1e9
        nearest = f"the smallest layout needs {gigabytes:.1f} GB per GPU ({smallest}) "
        nearest += tightness(run, found[0])
    advice = "nor on more GPUs: lower data.pack_tokens or data.max_pixels"
    more = num_gpus
    while more < MAX_GPUS:
        more = more * 2 if more < GPUS_PER_NODE else more + GPUS_PER_NODE * (1 + more // 64)
        chosen = choose(estimates(run, more))
        if chosen is not None:
            advice = f"use {more} GPUs ({chosen.layout}) or the settings in docs/memory.md"
            break
    if run.adapters is None and choose(estimates(_adapted(run), num_gpus)):
        advice += "; adapters fit here: adapter.rank=16 rollout.make_room=weights"
    where = f"{num_gpus} {run.gpu.name} of {run.gpu.memory_bytes / 1e9:.0f} GB"
    return ConfigError(f"nothing fits on {where}: {nearest}; {advice}")


def _adapted(run: PlannedRun) -> PlannedRun:
    """The run with small adapters in place of full training, with all room for the engine."""
    config = replace(run.config, adapter=AdapterConfig(rank=16))
    return with_room(replace(run, config=config))


def _lengths(run: PlannedRun) -> str:
    """The sequences of a step in one line."""
    readings = f", readings of {run.reading_tokens:.0f}" if run.reading_tokens else ""
    return (
        f"{run.config.data.prompts_per_step} x {run.samples_per_prompt} sequences of "
        f"{run.text_tokens:.0f} text + {run.image_tokens:.0f} image + {run.response_tokens:.0f} "
        f"response tokens{readings}, {run.config.updates_per_step} updates"
    )


def _steps(run: PlannedRun) -> str:
    """The length of the run; epochs are resolved only where the data is."""
    optimizer = run.config.optimizer
    if optimizer.num_steps is not None:
        return f"{optimizer.num_steps:,}"
    return f"unknown without the data (optimizer.num_epochs={optimizer.num_epochs:g})"


def _own_lines(run: PlannedRun, num_gpus: int) -> list[str]:
    """The layout that the configuration names, whether it fits or not."""
    layout = configured(run.config, num_gpus)
    if layout is None:
        return ["the configuration's own layout does not divide these GPUs", ""]
    try:
        check_layout(run.hf_config, run.config.parallel)
    except ConfigError as error:
        return [f"the configuration's own layout does not divide this model: {error}", ""]
    own = estimate(run, layout)
    verdict = "fits" if own.fits else "does not fit"
    return [f"the configuration's own layout {verdict}:", f"  {own.line()}", ""]


def _memory_lines(run: PlannedRun, best: Estimate) -> list[str]:
    memory, rollout = best.memory, run.config.rollout
    static, digits = memory.static, 3 if run.adapters else 1
    kinds: dict[str, float] = {"weights": static.weights}
    if run.adapters:
        kinds = {"frozen weights": static.frozen, "adapters": static.trained}
    kinds |= {"gradients": static.gradients, "optimizer": static.optimizer, **memory.activations}
    kinds |= {"reserved": RESERVED_BYTES, "total, training": memory.training, **memory.engine}
    if memory.engine:
        kinds["total, rollout"] = memory.rollout
    if static.host:
        kinds["optimizer in host memory"] = static.host
    if memory.engine and rollout.make_room == "weights":
        kinds["frozen weights in host memory"] = static.frozen
    if memory.engine and rollout.sleep_level == 1:
        kinds["engine weights in host memory"] = memory.engine["engine weights"]
    if run.adapters:
        kinds["a checkpoint, of all ranks"] = checkpoint_bytes(run.adapters, run.config.optimizer)
    return [f"  {name:<30}{value / 1e9:8.{digits}f}" for name, value in kinds.items()]


def _variant_lines(run: PlannedRun, best: Estimate) -> list[str]:
    """Variants of the proposal as keys; those that do not fit have no time."""
    proposed, lines = cut_keys(best.layout), []
    for other in variants(run, best.layout):
        keys = [f"{k}={v}" for k, v in cut_keys(other.layout).items() if v != proposed[k]]
        lines.append(f"  {other.line(' '.join(keys))}")
    return ["", "the same layout with other keys (no time: does not fit):", *lines] if lines else []
