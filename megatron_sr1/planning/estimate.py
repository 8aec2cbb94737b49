"""A layout's memory and time, the best layout, and what to say when none fits.

In: a configuration, a model's shape, a GPU and how many. Out: `Estimate`s. A layout fits if a rank
holds what it trains with, and beside the weights, gradients and state also the engine while that is
awake, and if the engine's cache has room for one longest sequence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from megatron_sr1.checkpoint.mapping import is_tower_frozen
from megatron_sr1.config import Config
from megatron_sr1.errors import ConfigError
from megatron_sr1.model.hf_config import HFConfig
from megatron_sr1.planning import engine_time, train_time
from megatron_sr1.planning.actor_time import Actor, balanced_layers
from megatron_sr1.planning.costs import compute_seconds
from megatron_sr1.planning.engine_time import Replica
from megatron_sr1.planning.layout import Layout, candidates, engine_sizes
from megatron_sr1.planning.rank_memory import Memory, rank_memory
from megatron_sr1.planning.static_memory import DTYPE_BYTES, StaticMemory
from megatron_sr1.planning.workload import Workload
from megatron_sr1.runtime.gpus import GPUS_PER_NODE, Gpu

NEARLY = 0.1
"""Layouts whose times differ by so much are held to be equally fast."""
MORE_STAGES = (2, 4)
"""Virtual stages that a proposal is compared with."""
MOST_GPUS = 4096
"""Largest cluster that is looked at for one that would do."""


@dataclass(frozen=True)
class Estimate:
    """A layout's memory and time.

    Attributes:
        layout: of the actor, and the engine's ranks.
        memory: of the fullest rank.
        fits: in the GPU, with a cache that holds one longest sequence.
        seconds: of a step by phase.
        mfu: by phase, operations that the model needs over those of the GPUs' peak.
    """

    layout: Layout
    memory: Memory
    fits: bool
    seconds: Mapping[str, float]
    mfu: Mapping[str, float]

    @property
    def step_seconds(self) -> float:
        """Of all phases."""
        return sum(self.seconds.values())


def estimate(
    config: Config, hf_config: HFConfig, layout: Layout, gpu: Gpu, work: Workload
) -> Estimate:
    """Memory and time of one layout."""
    replica = None if config.stage == "sft" else _replica(config, hf_config, gpu, layout.engine)
    actor = _actor(config, hf_config, layout, gpu, work)
    ranks = [rank_memory(actor, rank, replica) for rank in layout.ends]
    memory = max(ranks, key=lambda m: m.most)
    fits = memory.most <= gpu.memory_bytes
    if replica is not None:
        fits = fits and replica.cache_tokens >= config.rollout.max_model_len
    held = max((m.static for m in ranks), key=lambda s: s.weights)
    seconds, mfu = _phases(actor, held, replica)
    return Estimate(layout, memory, fits, seconds, mfu)


def estimates(
    config: Config, hf_config: HFConfig, gpu: Gpu, num_gpus: int, work: Workload
) -> list[Estimate]:
    """All layouts of a number of GPUs, those that fit first, the fastest first.

    Pipelines come with stages of equally many layers and with stages that take equally long.

    Raises:
        ConfigError: that many GPUs are no whole machines.
    """
    check_gpus(num_gpus)
    engine = _best_engine(config, hf_config, gpu, num_gpus, work)
    most_data = work.num_prompts // work.num_updates
    found = []
    for even in candidates(hf_config, num_gpus, most_data):
        layout = replace(even, engine=engine)
        for each in dict.fromkeys((layout, balanced(config, hf_config, layout, gpu, work))):
            found.append(estimate(config, hf_config, each, gpu, work))
    return sorted(found, key=lambda e: (not e.fits, e.step_seconds if e.fits else e.memory.most))


def balanced(
    config: Config, hf_config: HFConfig, layout: Layout, gpu: Gpu, work: Workload
) -> Layout:
    """The layout with ranks of the pipeline that take equally long, or nearly."""
    if layout.pipeline == 1:
        return layout
    split = balanced_layers(_actor(config, hf_config, layout, gpu, work))
    return replace(layout, stage_layers=split if len(set(split)) > 1 else ())


def variants(
    config: Config, hf_config: HFConfig, layout: Layout, gpu: Gpu, work: Workload
) -> list[Estimate]:
    """The same layout with stages, virtual stages or the tower cut in the other way."""
    evenly = replace(layout, stage_layers=())
    found = [evenly, balanced(config, hf_config, layout, gpu, work)]
    for virtual in MORE_STAGES:
        if 1 < layout.pipeline <= hf_config.text.num_layers / virtual:
            more = replace(layout, virtual=virtual)
            found.append(balanced(config, hf_config, more, gpu, work))
    if layout.tensor > 1:
        found.append(replace(layout, vision="images"))
    others = [other for other in dict.fromkeys(found) if other != layout]
    return [estimate(config, hf_config, other, gpu, work) for other in others]


def check_gpus(num_gpus: int) -> None:
    """Raise where a number of GPUs is not one that machines come in."""
    if num_gpus < 1 or (num_gpus > GPUS_PER_NODE and num_gpus % GPUS_PER_NODE):
        near = max(1, num_gpus // GPUS_PER_NODE) * GPUS_PER_NODE
        raise ConfigError(
            f"--gpus {num_gpus}: expected 1 to {GPUS_PER_NODE}, or whole machines of "
            f"{GPUS_PER_NODE}, as {near} or {near + GPUS_PER_NODE}"
        )


def choose(found: list[Estimate]) -> Estimate | None:
    """The layout to propose: of those nearly as fast as the fastest, the one that cuts least.

    Formulas do not know what small pieces cost, so a few percent are no reason to cut more.
    """
    fitting = [e for e in found if e.fits]
    if not fitting:
        return None
    bound = min(e.step_seconds for e in fitting) * (1 + NEARLY)
    near = [e for e in fitting if e.step_seconds <= bound]
    return min(
        near, key=lambda e: (e.layout.context, e.layout.pipeline, e.layout.tensor, e.step_seconds)
    )


def nothing_fits(
    found: list[Estimate],
    config: Config,
    hf_config: HFConfig,
    gpu: Gpu,
    num_gpus: int,
    work: Workload,
) -> ConfigError:
    """The error that says which layout comes nearest and how many GPUs would do."""
    nearest = "no layout divides the model"
    if found:
        least = found[0]
        nearest = f"the least is {least.memory.most / 1e9:.1f} GB a GPU ({least.layout})"
    advice = "nor on more: lower data.pack_tokens or data.max_pixels"
    more = num_gpus
    while more < MOST_GPUS:
        more = more * 2 if more < GPUS_PER_NODE else more + GPUS_PER_NODE * (1 + more // 64)
        chosen = choose(estimates(config, hf_config, gpu, more, work))
        if chosen is not None:
            advice = f"{more} would do ({chosen.layout}), or settings of docs/memory.md"
            break
    return ConfigError(
        f"nothing fits on {num_gpus} {gpu.name} of {gpu.memory_bytes / 1e9:.0f} GB: {nearest}; "
        f"{advice}"
    )


def _replica(config: Config, hf_config: HFConfig, gpu: Gpu, ranks: int) -> Replica:
    rollout = config.rollout
    share = rollout.gpu_memory_utilization * gpu.memory_bytes
    dtype_bytes = DTYPE_BYTES[config.model.dtype]
    return Replica(hf_config, gpu, ranks, share, dtype_bytes, rollout.max_num_seqs)


def _best_engine(
    config: Config, hf_config: HFConfig, gpu: Gpu, num_gpus: int, work: Workload
) -> int:
    """Ranks of a replica that sample fastest among those whose cache is large enough."""
    sizes = engine_sizes(hf_config, num_gpus)
    if config.stage == "sft":
        return sizes[0]

    def cost(ranks: int) -> tuple[bool, float]:
        replica = _replica(config, hf_config, gpu, ranks)
        if replica.cache_tokens < config.rollout.max_model_len:
            return True, -replica.cache_tokens
        return False, sum(engine_time.pass_seconds(replica, work, num_gpus // ranks))

    return min(sizes, key=cost)


def _actor(config: Config, hf_config: HFConfig, layout: Layout, gpu: Gpu, work: Workload) -> Actor:
    trains_tower = not is_tower_frozen(hf_config, config.model.freeze)
    kernels = train_time.kernels_of(config)
    return Actor(config, hf_config, layout, gpu, kernels, trains_tower, work)


def _phases(
    actor: Actor, held: StaticMemory, replica: Replica | None
) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds and model operations' share of the peak, by phase in the order of a step."""
    hf_config, gpu, work, world = actor.hf_config, actor.gpu, actor.work, actor.layout.num_ranks
    forward = train_time.step_work(hf_config, work).total
    done: dict[str, tuple[float, float]] = {}
    if replica is not None:
        replicas = world // replica.ranks
        first, second = engine_time.decode_work(hf_config, work)
        pass1, pass2 = engine_time.pass_seconds(replica, work, replicas)
        prefill = engine_time.prefill_work(hf_config, work)
        done["sync"] = engine_time.sync_seconds(replica, world), 0.0
        done["prefill"] = compute_seconds(prefill, gpu) / world, prefill.total
        done["pass1"] = pass1, first.total
        if work.reading_tokens:
            done["pass2"] = pass2, second.total
        if work.num_updates > 1:
            done["old_logprobs"] = train_time.forward_seconds(actor), forward
        if work.has_reference:
            done["reference"] = train_time.reference_seconds(actor, held), forward
    done["update"] = train_time.update_seconds(actor, held), train_time.update_work(actor)
    seconds = {name: time for name, (time, _) in done.items()}
    mfu = {
        name: flops / (max(time, 1e-9) * gpu.peak_flops * world)
        for name, (time, flops) in done.items()
    }
    total = sum(flops for _, flops in done.values())
    mfu["step"] = total / (sum(seconds.values()) * gpu.peak_flops * world)
    return seconds, mfu
