"""Print the table of docs/memory.md: what fits on a few GPUs, fully trained and with adapters.

All figures are the planner's, of the layout with the least memory: shapes of the published models,
settings of the recipes, mean lengths as `megatron-sr1 plan` assumes them.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from megatron_sr1.config.loading import load_config
from megatron_sr1.planning.estimates import Estimate, estimates
from megatron_sr1.planning.plan import with_room
from megatron_sr1.planning.workload import planned_run
from megatron_sr1.runtime.gpus import find_gpu
from tools.engine_steps import read_published

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


class Row(NamedTuple):
    """Hardware, model, the recipe whose settings are used."""

    num_gpus: int
    gpu: str
    size: str
    adapters: str


ROWS = (
    Row(1, "rtx4090", "3b", "3b_lora_1gpu"),
    Row(1, "h100", "3b", "3b_lora_1gpu"),
    Row(1, "rtx4090", "7b", "7b_lora"),
    Row(1, "h100", "7b", "7b_lora"),
    Row(8, "h100", "72b", "72b_lora_8gpus"),
)
LEAST = ["optimizer.state=bfloat16", "optimizer.gradients=bfloat16", "optimizer.beta2=0.99"]
LEAST += ["optimizer.offload=true"]


def least(row: Row, name: str, keys: list[str]) -> Estimate:
    """Return the layout with the least memory; frozen weights leave the GPU for the rollout."""
    config = load_config(EXAMPLES / f"qwen25vl_{name}.yaml", keys)
    run = planned_run(config, read_published(row.size), find_gpu(row.gpu))
    found = estimates(with_room(run) if run.adapters else run, row.num_gpus)
    return min([e for e in found if e.fits] or found, key=lambda e: e.memory.peak)


def line(row: Row, trained: str, found: Estimate) -> str:
    """Return a line of the table, GB a GPU."""
    memory = found.memory
    static = memory.static
    state = f"{static.optimizer / 1e9:.1f}" + (f" + {static.host / 1e9:.1f}" if static.host else "")
    cells = [
        f"{row.size.upper()}, {row.num_gpus} x {find_gpu(row.gpu).memory_bytes / 1e9:.0f} GB",
        trained,
        f"{static.weights / 1e9:.1f}",
        f"{static.gradients / 1e9:.1f}",
        state,
        f"{memory.training / 1e9:.1f}",
        f"{memory.rollout / 1e9:.1f}",
        "yes" if found.fits else "no",
    ]
    return f"| {' | '.join(cells)} |"


def table() -> str:
    """Return the whole table."""
    titles = [
        "model, GPUs",
        "trained",
        "weights",
        "gradients",
        "state",
        "update",
        "rollout",
        "fits",
    ]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for row in ROWS:
        lines.append(line(row, "all", least(row, row.size, [])))
        lines.append(line(row, "all, least memory", least(row, row.size, LEAST)))
        lines.append(line(row, "adapters of rank 64", least(row, row.adapters, [])))
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
