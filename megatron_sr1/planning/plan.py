"""The plan of a run: memory and time of all layouts, the one to propose, its variants.

A layout fits if its fullest rank fits in the GPU, during an update and, with what the actor keeps
beside the awake engine, during a rollout; and if the engine's cache holds one sequence of the
maximum length.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

from megatron_sr1.errors import ConfigError
from megatron_sr1.model import flops
from megatron_sr1.model.hf_config import check_layout
from megatron_sr1.planning.actor_time import ActorCost, forward_work
from megatron_sr1.planning.costs import RESERVED_BYTES, compute_seconds, transfer_seconds
from megatron_sr1.planning.engine_time import Replica, prefill_work
from megatron_sr1.planning.layout import Layout, candidates, configured, cut_keys, engine_sizes
from megatron_sr1.planning.memory import Memory, StaticMemory, rank_memory
from megatron_sr1.planning.workload import PlannedRun, num_parameters
from megatron_sr1.runtime.gpus import GPUS_PER_NODE

NEARLY = 0.1
"""Relative difference of step times below which two layouts count as equally fast."""
MORE_STAGES = (2, 4)
"""Virtual stages that a proposal is compared with."""
MAX_GPUS = 4096
"""Largest cluster that the search for a sufficient one tries."""
NUM_SHOWN = 8
"""Layouts that are listed."""


@dataclass(frozen=True)
class Estimate:
    """Memory and time of a layout.

    Attributes:
        memory: of the fullest rank.
        fits: the layout can run (see above).
        seconds: time of a step, by phase.
        mfu: the model's operations over the GPUs' peak, by phase and of the whole step.
    """

    layout: Layout
    memory: Memory
    fits: bool
    seconds: Mapping[str, float]
    mfu: Mapping[str, float]

    @property
    def step_seconds(self) -> float:
        """Time of all phases."""
        return sum(self.seconds.values())

    def line(self, name: str = "") -> str:
        """Describe in one line: time if it fits, memory, and `name` or the layout."""
        seconds = f"{self.step_seconds:8.1f} s" if self.fits else " " * 10
        name = name or f"{self.layout}, engine {self.layout.engine}"
        return f"{seconds}  {self.memory.peak / 1e9:5.1f} GB  {name}"


def plan(run: PlannedRun, num_gpus: int) -> str:
    """Return the text that `megatron-sr1 plan` prints, for a run that uses all GPUs.

    Raise a ConfigError if nothing fits, nothing is trained, or the GPUs are not whole nodes.
    """
    config, gpu = run.config, run.gpu
    if config.stage == "eval":
        raise ConfigError("stage=eval trains nothing, so it has no layout to plan; use sft or grpo")
    found = estimates(run, num_gpus)
    best = choose(found)
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
        f"proposed: {best.layout}, engine {best.layout.engine}; GB on the fullest GPU:",
        *_memory_lines(best.memory),
        "",
        "time of a step by phase (without reading data and grading):",
        *(
            f"  {name:<14}{seconds:9.1f} s{100 * best.mfu[name]:7.1f} % MFU"
            for name, seconds in [*best.seconds.items(), ("step", best.step_seconds)]
        ),
        *_variant_lines(run, best),
        "",
        "as configuration keys:",
        *(f"  {text}" for text in best.layout.overrides(config)),
    ]
    return "\n".join(lines)


def estimates(run: PlannedRun, num_gpus: int) -> list[Estimate]:
    """Return all layouts: those that fit, sorted by time, then the others, sorted by memory.

    Each pipeline appears with equal stages and with balanced ones. Raise a ConfigError if the GPUs
    are neither a part of a node nor whole nodes.
    """
    if num_gpus < 1 or (num_gpus > GPUS_PER_NODE and num_gpus % GPUS_PER_NODE):
        near = max(1, num_gpus // GPUS_PER_NODE) * GPUS_PER_NODE
        expected = f"1 to {GPUS_PER_NODE}, or a multiple of {GPUS_PER_NODE}, e.g. {near} or "
        raise ConfigError(f"--gpus {num_gpus}: expected {expected}{near + GPUS_PER_NODE}")
    engine = _fastest_engine(run, num_gpus)
    max_data = run.config.data.prompts_per_step // run.config.updates_per_step
    found = []
    for layout in candidates(run.hf_config, num_gpus, max_data, engine):
        both = dict.fromkeys((layout, ActorCost(run, layout).balanced()))
        found += [estimate(run, each) for each in both]
    return sorted(found, key=lambda e: (not e.fits, e.step_seconds if e.fits else e.memory.peak))


def estimate(run: PlannedRun, layout: Layout) -> Estimate:
    """Return memory and time of one layout."""
    replica = _replica(run, layout.engine) if run.has_rollouts else None
    ranks = [rank_memory(run, layout, rank, replica) for rank in layout.ends]
    memory = max(ranks, key=lambda m: m.peak)
    fits = memory.peak <= run.gpu.memory_bytes
    if replica is not None:
        fits = fits and replica.cache_tokens >= run.config.rollout.max_model_len
    held = max((m.static for m in ranks), key=lambda s: s.weights)
    seconds, mfu = _phases(ActorCost(run, layout), held, replica)
    return Estimate(layout, memory, fits, seconds, mfu)


def variants(run: PlannedRun, layout: Layout) -> list[Estimate]:
    """Return the layout with other stages, virtual stages and the other split of the tower."""
    found = [replace(layout, stage_layers=()), ActorCost(run, layout).balanced()]
    for virtual in MORE_STAGES:
        if 1 < layout.pipeline <= run.hf_config.text.num_layers / virtual:
            found.append(ActorCost(run, replace(layout, virtual=virtual)).balanced())
    if layout.tensor > 1:
        found.append(replace(layout, vision="images"))
    return [estimate(run, other) for other in dict.fromkeys(found) if other != layout]


def choose(found: list[Estimate]) -> Estimate | None:
    """Return the layout to propose: among those nearly as fast as the fastest, the least split one.

    The formulas do not model the overhead of small kernels, so a few percent do not justify more
    splitting.
    """
    fitting = [e for e in found if e.fits]
    limit = min((e.step_seconds for e in fitting), default=0.0) * (1 + NEARLY)
    return min(
        (e for e in fitting if e.step_seconds <= limit),
        key=lambda e: (e.layout.context, e.layout.pipeline, e.layout.tensor, e.step_seconds),
        default=None,
    )


def _nothing_fits(run: PlannedRun, num_gpus: int, found: list[Estimate]) -> ConfigError:
    """Return the error that names the smallest layout and a sufficient number of GPUs."""
    nearest = "no layout divides the model"
    if found:
        smallest, gigabytes = found[0].layout, found[0].memory.peak / 1e9
        nearest = f"the smallest layout needs {gigabytes:.1f} GB per GPU ({smallest})"
    advice = "nor on more GPUs: lower data.pack_tokens or data.max_pixels"
    more = num_gpus
    while more < MAX_GPUS:
        more = more * 2 if more < GPUS_PER_NODE else more + GPUS_PER_NODE * (1 + more // 64)
        chosen = choose(estimates(run, more))
        if chosen is not None:
            advice = f"use {more} GPUs ({chosen.layout}) or the settings in docs/memory.md"
            break
    where = f"{num_gpus} {run.gpu.name} of {run.gpu.memory_bytes / 1e9:.0f} GB"
    return ConfigError(f"nothing fits on {where}: {nearest}; {advice}")


def _replica(run: PlannedRun, ranks: int) -> Replica:
    rollout = run.config.rollout
    share = rollout.gpu_memory_utilization * run.gpu.memory_bytes
    return Replica(run.hf_config, run.gpu, ranks, share, run.dtype_bytes, rollout.max_num_seqs)


def _fastest_engine(run: PlannedRun, num_gpus: int) -> int:
    """Size of the fastest replica whose cache is sufficient, or of the one with most cache."""
    sizes = engine_sizes(run.hf_config, num_gpus)
    if not run.has_rollouts:
        return sizes[0]

    def cost(ranks: int) -> tuple[bool, float]:
        replica = _replica(run, ranks)
        if replica.cache_tokens < run.config.rollout.max_model_len:
            return True, -replica.cache_tokens
        return False, sum(replica.pass_seconds(run, num_gpus // ranks))

    return min(sizes, key=cost)


def _phases(
    actor: ActorCost, held: StaticMemory, replica: Replica | None
) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds and MFU by phase, in the order of a step."""
    run, world = actor.run, actor.layout.num_ranks
    peak = run.gpu.peak_flops * world
    phases: dict[str, tuple[float, float]] = {}
    if replica is not None:
        prefill, forward = prefill_work(run), forward_work(run).total
        response, reading = run.response_tokens, run.reading_tokens
        responses = flops.text(run.hf_config, response, response, run.prompt_tokens)
        readings = flops.text(run.hf_config, reading, reading, run.reading_prompt_tokens)
        pass1, pass2 = replica.pass_seconds(run, world // replica.ranks)
        phases["sync"] = replica.sync_seconds(world), 0.0
        phases["prefill"] = compute_seconds(prefill, run.gpu) / world, prefill.total
        phases["pass1"] = pass1, responses.total * run.num_sequences
        if reading:
            phases["pass2"] = pass2, readings.total * run.num_sequences
        num_updates = run.config.updates_per_step
        if num_updates > 1:  # the first of them needs none
            part = 1 - 1 / num_updates
            phases["old_logprobs"] = part * actor.forward_seconds(), part * forward
        if run.config.algorithm.kl_coefficient > 0:
            copy = transfer_seconds(held.weights, run.gpu.host_rate)  # over PCIe
            phases["reference"] = actor.forward_seconds() + copy, forward
    phases["update"] = actor.update_seconds(held), actor.update_flops()
    seconds = {name: time for name, (time, _) in phases.items()}
    mfu = {name: done / (max(time, 1e-9) * peak) for name, (time, done) in phases.items()}
    mfu["step"] = sum(done for _, done in phases.values()) / (sum(seconds.values()) * peak)
    return seconds, mfu


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


def _memory_lines(memory: Memory) -> list[str]:
    static = asdict(memory.static)
    host = static.pop("host")
    kinds = {
        **static,
        **memory.activations,
        "reserved": RESERVED_BYTES,
        "total, training": memory.training,
        **memory.engine,
    }
    if memory.engine:
        kinds["total, rollout"] = memory.rollout
    if host:
        kinds["optimizer in host memory"] = host
    return [f"  {name:<26}{value / 1e9:8.1f}" for name, value in kinds.items()]


def _variant_lines(run: PlannedRun, best: Estimate) -> list[str]:
    """Variants of the proposal as keys; those that do not fit have no time."""
    proposed, lines = cut_keys(best.layout), []
    for other in variants(run, best.layout):
        keys = [f"{k}={v}" for k, v in cut_keys(other.layout).items() if v != proposed[k]]
        lines.append(f"  {other.line(' '.join(keys))}")
    return ["", "the same layout with other keys (no time: does not fit):", *lines] if lines else []
