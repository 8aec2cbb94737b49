"""The benchmark's numbers as Markdown, the declared workload on the cost model, and the bounds.

In: what bench_engine.py and compare_trl.py wrote. Out: text.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from megatron_sr1.planning.engine_time import Replica
from tools.recording import EngineStep
from tools.roofline import H100, read_published, replay_seconds, whole_gpu
from tools.schedules import SCHEDULES, DeclaredWorkload, Limits, simulate

MODELS = ("3b", "7b")
SEQUENCES = (64, 128, 256, 512)
SEEDS = (1, 2, 3)
STEP_TOKENS, BLOCK_TOKENS = 16384, 16  # vLLM's defaults on an H100
VARIANTS: dict[str, tuple[DeclaredWorkload, dict[str, Any]]] = {
    "declared": (DeclaredWorkload(), {}),
    "description a quarter": (DeclaredWorkload(description_share=0.25), {}),
    "description 60 %": (DeclaredWorkload(description_share=0.6), {}),
    "longer tail, sigma 0.9": (DeclaredWorkload(response_sigma=0.9), {}),
    "no fixed time a step": (DeclaredWorkload(), {"step_overhead_seconds": 0.0}),
    "half of the peak": (DeclaredWorkload(), {"gpu": replace(H100, matmul_share=0.5)}),
}
"""Name -> workload, changed fields of the replica."""

Gpu = dict[str, dict[str, dict[str, float]]]
"""Model -> sequences a GPU -> schedule -> seconds."""


def gpu_seconds() -> dict[str, Gpu]:
    """Seconds of a step's rollouts on the modelled GPU, by variant; means over workload seeds."""
    replicas = {model: whole_gpu(read_published(model)) for model in MODELS}
    simulated: dict[tuple[DeclaredWorkload, int], dict[str, list[list[EngineStep]]]] = {}
    found: dict[str, Gpu] = {}
    for name, (workload, changes) in VARIANTS.items():
        found[name] = {model: {} for model in MODELS}
        for num in SEQUENCES:
            if (workload, num) not in simulated:
                simulated[workload, num] = _simulated(workload, num)
            runs = simulated[workload, num]
            for model, plain in replicas.items():
                replica = replace(plain, **changes)
                _check_memory(runs, replica)
                found[name][model][str(num)] = {
                    schedule: statistics.mean(replay_seconds(s, replica) for s in steps)
                    for schedule, steps in runs.items()
                }
    return found


def _simulated(workload: DeclaredWorkload, num: int) -> dict[str, list[list[EngineStep]]]:
    limits = Limits(2 * num, STEP_TOKENS, BLOCK_TOKENS, chunked=True)
    drawn = [workload.draw(num, seed) for seed in SEEDS]
    return {s: [simulate(jobs, s, limits) for jobs in drawn] for s in SCHEDULES}


def _check_memory(runs: dict[str, list[list[EngineStep]]], replica: Replica) -> None:
    """No step may need more keys and values than fit beside the weights."""
    most = max(step.context_tokens for steps in runs.values() for s in steps for step in s)
    weights = replica.dtype_bytes * (replica.layer_weights + replica.output_weights)
    assert most * replica.token_bytes + weights < replica.memory_bytes, most


def share(seconds: dict[str, float]) -> float:
    """Forked's extra over one pass, as a share of the barrier's."""
    return (seconds["forked"] - seconds["one"]) / (seconds["barrier"] - seconds["one"])


def gpu_tables(gpu: dict[str, Gpu]) -> str:
    """The declared workload in seconds, and the shares of all variants."""
    rows = [
        [f"{model.upper()}, {num}", *_schedule_cells(seconds, ".2f"), f"{share(seconds):.2f}"]
        for model, by_num in gpu["declared"].items()
        for num, seconds in by_num.items()
    ]
    names = ["model, sequences a GPU", "one, s", "barrier, s", "forked, s", "share of extra"]
    first = table(names, rows)
    columns = [f"{model.upper()}, {num}" for model in MODELS for num in SEQUENCES]
    rows = [
        [name, *(f"{share(found[m][str(n)]):.2f}" for m in MODELS for n in SEQUENCES)]
        for name, found in gpu.items()
    ]
    return f"{first}\n{table(['share of extra', *columns], rows)}"


def model_tables(name: str, found: dict[str, Any]) -> str:
    """Schedules by seed, their means, sync and step of one model."""
    seeds = found["engine"]["schedules"]["seeds"]
    rows = []
    for seed in seeds:
        steps = [str(seed[s]["engine_steps"]) for s in SCHEDULES]
        seconds = [f"{seed[s]['seconds']:.2f}" for s in SCHEDULES]
        rates = [f"{seed[s]['tokens_per_second']:.0f}" for s in SCHEDULES]
        extra = share({s: seed[s]["engine_steps"] for s in SCHEDULES})
        exact = all(seed[s]["simulated_equals_recorded"] for s in SCHEDULES)
        cells = [" / ".join(part) for part in (steps, seconds, rates)]
        told = ["yes" if yes else "no" for yes in (seed["same_tokens"], exact)]
        rows.append([str(seed["seed"]), *cells, f"{extra:.2f}", *told])
    head = ["seed", "engine steps", "seconds", "tokens/s", "share of extra steps", "same tokens"]
    parts = [f"### {name}: one / barrier / forked\n", table([*head, "simulated = recorded"], rows)]
    parts.append(table(["seed", "response", "description", "reading", "read"], _lengths(seeds)))
    ratios = sorted(forked_over_barrier(seeds))
    parts.append(
        f"seconds, forked / barrier, of neighbouring runs: median {statistics.median(ratios):.2f}, "
        f"from {ratios[0]:.2f} to {ratios[-1]:.2f}\n"
    )
    sync = found["engine"]["sync"]
    parts.append(
        f"sync: {sync['bytes']:,} bytes in {sync['seconds']:.4f} s, a plain copy of them in "
        f"{sync['memcpy_seconds']:.4f} s; {sync['extra_bytes_peak']:,} bytes beside the weights at "
        f"most, the engine's largest layer has {sync['largest_layer_bytes']:,}\n"
    )
    step = found["step"]
    medians, phases = step["median_step_seconds"], step["median_phase_seconds"]
    told = ", ".join(
        f"{key.removeprefix('time/').removesuffix('_seconds')} {value:.2f}"
        for key, value in sorted(phases.items(), key=lambda item: -item[1])
    )
    parts.append(
        f"a GRPO step: ours (two passes) {medians['ours']:.2f} s, TRL (one pass) "
        f"{medians['trl']:.2f} s, ratio {step['ratio']:.2f}, by round "
        f"{', '.join(f'{r:.2f}' for r in step['ratio_by_round'])}; by phase: {told}\n"
    )
    return "\n".join(parts)


def _lengths(seeds: Sequence[dict[str, Any]]) -> list[list[str]]:
    rows = []
    for seed in seeds:
        lengths = seed["lengths"]
        spans = (lengths[part] for part in ("response", "description", "reading"))
        cells = [f"{s['mean']:.1f}, {s['p50']:.0f}, {s['p99']:.0f}, {s['max']}" for s in spans]
        read = f"{lengths['descriptions']} ({lengths['distinct_readings']} distinct)"
        rows.append([str(seed["seed"]), *cells, read])
    return rows


def _schedule_cells(values: dict[str, float], form: str) -> list[str]:
    return [format(values[schedule], form) for schedule in SCHEDULES]


def verdicts(models: dict[str, dict[str, Any]], gpu: Gpu) -> dict[str, bool]:
    """The bounds: schedules of the demo's policy by seed and on the modelled GPU, syncs, step."""
    checked = {}
    demo = models["demo"]
    seeds = demo["engine"]["schedules"]["seeds"]
    for seed in seeds:
        steps = {s: seed[s]["engine_steps"] for s in SCHEDULES}
        told = " / ".join(map(str, steps.values()))
        checked[f"seed {seed['seed']}: {told} engine steps, 0.4 of the extra"] = share(steps) <= 0.4
    for model, by_num in gpu.items():
        for num in SEQUENCES[:3]:
            part = share(by_num[str(num)])
            checked[f"{model}, {num} sequences: {part:.2f} of the extra time, 0.5"] = part <= 0.5
    rounds = statistics.median(forked_over_barrier(seeds))
    checked[f"wall time of the demo's rollouts, forked / barrier: {rounds:.2f}, 1"] = rounds <= 1
    for name, found in models.items():
        sync = found["engine"]["sync"]
        extra, layer = sync["extra_bytes_peak"], sync["largest_layer_bytes"]
        told = f"{name}, sync: {extra:,} bytes at most beside the weights, 2 x {layer:,}"
        checked[told] = extra <= 2 * layer
    ratio = demo["step"]["ratio"]
    checked[f"a step of the demo's over TRL's: {ratio:.2f}, 0.8"] = ratio <= 0.8
    return checked


def forked_over_barrier(seeds: Sequence[dict[str, Any]]) -> list[float]:
    """Ratios of the seconds of neighbouring runs, of all seeds."""
    pairs = [
        pair
        for seed in seeds
        for pair in zip(seed["forked"]["all_seconds"], seed["barrier"]["all_seconds"], strict=True)
    ]
    return [forked / barrier for forked, barrier in pairs]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
