"""A declared workload of rollouts on the cost model of an H100: one pass, barrier and forked.

Seconds and shares for published models, numbers of sequences and variants of the assumptions
(docs/bench.md); bench.py prints the tables and checks the limit.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from megatron_sr1.planning.engine_time import Replica
from tools.engine_steps import (
    H100,
    SCHEDULES,
    DeclaredWorkload,
    EngineStep,
    Limits,
    read_published,
    replay_seconds,
    simulate,
    whole_gpu,
)

MODELS = ("3b", "7b")
SEQUENCES = (64, 128, 256, 512)
SEEDS = (1, 2, 3)
STEP_TOKENS, BLOCK_TOKENS = 16384, 16  # vLLM's defaults on an H100
VARIANTS: dict[str, tuple[DeclaredWorkload, dict[str, Any]]] = {
    "declared": (DeclaredWorkload(), {}),
    "description a quarter": (DeclaredWorkload(description_share=0.25), {}),
    "description 60 %": (DeclaredWorkload(description_share=0.6), {}),
    "longer tail, sigma 0.9": (DeclaredWorkload(response_sigma=0.9), {}),
    "no fixed time per step": (DeclaredWorkload(), {"step_overhead_seconds": 0.0}),
    "half of the peak": (DeclaredWorkload(), {"gpu": replace(H100, matmul_share=0.5)}),
}
"""Name -> workload, changed fields of the replica."""

Gpu = dict[str, dict[str, dict[str, float]]]
"""Model -> sequences per GPU -> schedule -> seconds."""


def gpu_seconds() -> dict[str, Gpu]:
    """Time a step's rollouts on the modelled GPU: variant -> seconds, means over the seeds."""
    replicas = {model: whole_gpu(read_published(model)) for model in MODELS}
    found: dict[str, Gpu] = {}
    for name, (workload, changes) in VARIANTS.items():
        found[name] = {model: {} for model in MODELS}
        for num in SEQUENCES:
            runs = _simulated(workload, num)
            for model, plain in replicas.items():
                replica = replace(plain, **changes)
                _check_memory(runs, replica)
                found[name][model][str(num)] = {
                    schedule: statistics.mean(replay_seconds(s, replica) for s in steps)
                    for schedule, steps in runs.items()
                }
    return found


@functools.cache  # variants of the replica share a workload
def _simulated(workload: DeclaredWorkload, num: int) -> dict[str, list[list[EngineStep]]]:
    limits = Limits(2 * num, STEP_TOKENS, BLOCK_TOKENS, chunked=True)
    drawn = [workload.draw(num, seed) for seed in SEEDS]
    return {s: [simulate(jobs, s, limits) for jobs in drawn] for s in SCHEDULES}


def _check_memory(runs: dict[str, list[list[EngineStep]]], replica: Replica) -> None:
    """Assert that each step's keys and values fit beside the weights."""
    most = max(step.context_tokens for steps in runs.values() for s in steps for step in s)
    weights = replica.dtype_bytes * (replica.layer_weights + replica.output_weights)
    assert most * replica.token_bytes + weights < replica.memory_bytes, most


def share(seconds: dict[str, float]) -> float:
    """Return the extra of a fork over one pass, as a share of the barrier's."""
    return (seconds["forked"] - seconds["one"]) / (seconds["barrier"] - seconds["one"])


def gpu_tables(gpu: dict[str, Gpu]) -> str:
    """Show the declared workload in seconds, and the shares of all variants."""
    rows = [
        [f"{model.upper()}, {num}", *(f"{t:.2f}" for t in (*seconds.values(), share(seconds)))]
        for model, by_num in gpu["declared"].items()
        for num, seconds in by_num.items()
    ]
    names = ["model, sequences per GPU", "one, s", "barrier, s", "forked, s", "share of extra"]
    first = table(names, rows)
    columns = [f"{model.upper()}, {num}" for model in MODELS for num in SEQUENCES]
    rows = [
        [name, *(f"{share(found[m][str(n)]):.2f}" for m in MODELS for n in SEQUENCES)]
        for name, found in gpu.items()
    ]
    return f"{first}\n{table(['share of extra', *columns], rows)}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
