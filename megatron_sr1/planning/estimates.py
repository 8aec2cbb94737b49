"""Memory and time of layouts, and the layout to propose.

A layout fits if its fullest rank fits in the GPU, during an update and, with what the actor keeps
beside the awake engine, during a rollout; and if the engine's cache holds one sequence of the
maximum length.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from megatron_sr1.errors import ConfigError
from megatron_sr1.model import flops
from megatron_sr1.planning.actor_time import ActorCost, adapters_work, forward_work
from megatron_sr1.planning.costs import compute_seconds, transfer_seconds
from megatron_sr1.planning.engine_time import Replica, prefill_work
from megatron_sr1.planning.layout import Layout, candidates, engine_sizes
from megatron_sr1.planning.memory import Memory, StaticMemory, rank_memory
from megatron_sr1.planning.workload import PlannedRun
from megatron_sr1.runtime.gpus import GPUS_PER_NODE

NEARLY = 0.1
"""Relative difference of step times below which two layouts count as equally fast."""
MORE_STAGES = (2, 4)
"""Virtual stages that a proposal is compared with."""


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
        key=lambda e: (e.layout.splits, e.step_seconds),
        default=None,
    )


def tightness(run: PlannedRun, found: Estimate) -> str:
    """Say when a layout needs the most memory, or what the engine's cache lacks."""
    memory = found.memory
    if memory.peak <= run.gpu.memory_bytes:
        tokens = max(_replica(run, found.layout.engine).cache_tokens, 0)
        limit = run.config.rollout.max_model_len
        share = run.config.rollout.gpu_memory_utilization
        return (
            f"and its engine a cache of {limit:,} tokens, of which "
            f"rollout.gpu_memory_utilization={share:g} leaves {tokens:,.0f}"
        )
    when, kinds = "while the engine samples", dict(memory.engine)
    kinds["actor"] = memory.static.beside_engine(run.config.rollout.make_room)
    if memory.training >= memory.rollout:
        when, kinds = "in an update", {"weights": memory.static.weights}
        kinds |= {"gradients": memory.static.gradients, "optimizer": memory.static.optimizer}
        kinds["activations"] = sum(memory.activations.values())
    parts = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in kinds.items() if size > 5e7)
    return f"{when} ({parts})"


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


def _swap_seconds(run: PlannedRun, held: StaticMemory, replica: Replica) -> float:
    """Time to move weights that make room for each other between GPU and host memory."""
    rollout, moved = run.config.rollout, 0.0
    if rollout.make_room == "weights":
        moved += held.frozen  # back; host memory keeps a copy
    if rollout.sleep_level == 1:
        moved += 2 * replica.weight_bytes
    return transfer_seconds(moved, run.gpu.host_rate)


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
        phases["sync"] = replica.sync_seconds(run, world) + _swap_seconds(run, held, replica), 0.0
        phases["prefill"] = compute_seconds(prefill, run.gpu) / world, prefill.total
        phases["pass1"] = pass1, responses.total * run.num_sequences
        if reading:
            phases["pass2"] = pass2, readings.total * run.num_sequences
        num_updates = run.config.updates_per_step
        if num_updates > 1:  # the first of them needs none
            part = 1 - 1 / num_updates
            phases["old_logprobs"] = part * actor.forward_seconds(), part * forward
        if run.config.algorithm.kl_coefficient > 0:
            plain = replace(actor, run=run.without_adapters())  # switched off, the base is frozen
            copied = 0 if run.adapters else held.weights  # over PCIe
            copy = transfer_seconds(copied, run.gpu.host_rate)
            base = forward - adapters_work(run).total
            phases["reference"] = plain.forward_seconds() + copy, base
    phases["update"] = actor.update_seconds(held), actor.update_flops()
    seconds = {name: time for name, (time, _) in phases.items()}
    mfu = {name: done / (max(time, 1e-9) * peak) for name, (time, done) in phases.items()}
    mfu["step"] = sum(done for _, done in phases.values()) / (sum(seconds.values()) * peak)
    return seconds, mfu
