"""Print the table of docs/planner.md that compares the planner with figures of other systems.

Lengths and layouts that are not published were assumed before the comparison, and nothing was
adjusted after it.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from megatron_sr1.config.loading import load_config
from megatron_sr1.planning.estimates import Estimate, estimate
from megatron_sr1.planning.layout import Layout
from megatron_sr1.planning.workload import PlannedRun, planned_run
from megatron_sr1.runtime.gpus import find_gpu
from tools.engine_steps import read_published

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "qwen25vl_7b.yaml"
NUM_GPUS = 8
IMAGE_TOKENS = 262144 / 28**2  # diagrams of Geometry3k are enlarged to EasyR1's min_pixels
TEXT_TOKENS = 100.0  # assumption: question and format prompt


class EasyR1(NamedTuple):
    """A published result: Qwen2.5-VL on Geometry3k, 512 x 5 rollouts, 8 H100, FSDP."""

    size: str
    engine: int
    token_rate: float
    step_seconds: float
    actor_mfu: float


EASYR1 = (
    EasyR1("3b", 2, 1800, 120, 0.08),
    EasyR1("7b", 2, 2000, 120, 0.23),
    EasyR1("32b", 8, 620, 530, 0.26),
)


def text_flops(run: PlannedRun) -> float:
    """Return a step's operations as EasyR1 counts them (its verl/utils/flops_counter.py).

    It counts no tower, both vocabulary matrices and the whole squares of attention.
    """
    text, length = run.hf_config.text, run.sequence_tokens
    k = text.num_key_value_heads * text.head_dim
    layer = text.hidden_size * (2 * text.hidden_size + 2 * k + 3 * text.intermediate_size)
    weights = layer * text.num_layers + 2 * text.vocab_size * text.hidden_size
    squares = 12 * length**2 * text.hidden_size * text.num_layers
    return run.num_sequences * (6 * weights * length + squares)


def easyr1_rows(line: EasyR1) -> list[str]:
    """Return the rows of a result; a data-parallel layout with full recomputation models FSDP."""
    keys = ["rollout.samples_per_prompt=5", "reward.recipe=vision_r1", "model.recompute=full"]
    config = load_config(EXAMPLE, [*keys, "rollout.gpu_memory_utilization=0.6"])
    gpu = find_gpu("h100")
    tokens = line.token_rate * NUM_GPUS * line.step_seconds / (512 * 5)  # mean length
    lengths = {"text_tokens": TEXT_TOKENS, "image_tokens": IMAGE_TOKENS}
    lengths["response_tokens"] = tokens - TEXT_TOKENS - IMAGE_TOKENS
    run = planned_run(config, read_published(line.size), gpu, lengths)
    layout = Layout(data=NUM_GPUS, recompute="full", engine=line.engine)
    found = estimate(run, layout)
    mfu = text_flops(run) / (found.seconds["update"] * NUM_GPUS * gpu.peak_flops)
    rate = run.num_sequences * run.sequence_tokens / found.step_seconds / NUM_GPUS
    name = f"EasyR1 {line.size.upper()}, 8 x H100"
    return [
        row(f"{name}: step, s", line.step_seconds, found.step_seconds),
        row(f"{name}: tokens/s/GPU", line.token_rate, rate),
        row(f"{name}: actor MFU, %", 100 * line.actor_mfu, 100 * mfu),
    ]


def example(gpu: str, size: str = "7b", engine: int = 1, tensor: int = 4) -> Estimate:
    """Estimate the 7B example with assumed lengths; pass 2 waits for pass 1, as upstream."""
    config = load_config(EXAMPLE, ["rollout.pass2=barrier"])
    layout = Layout(tensor, data=NUM_GPUS // tensor, sequence=True, recompute="full", engine=engine)
    return estimate(planned_run(config, read_published(size), find_gpu(gpu)), layout)


def row(name: str, published: float, planned: float) -> str:
    """Return a line of the table."""
    error = 100 * (planned - published) / published
    return f"| {name} | {published:.4g} | {planned:.3g} | {error:+.0f} % |"


def range_row(name: str, low: float, high: float, planned: float) -> str:
    """Return a line whose published figure is a range."""
    where = "inside" if low <= planned <= high else "outside"
    return f"| {name} | {low:g} to {high:g} | {planned:.2g} | {where} |"


def table() -> str:
    """Return the whole table."""
    lines = ["| figure | published | planned | error |", "|---|---|---|---|"]
    for line in EASYR1:
        lines += easyr1_rows(line)
    seven = example("h100")
    forwards = seven.seconds["old_logprobs"] + seven.seconds["reference"]
    share = 100 * forwards / seven.step_seconds
    mfu = 100 * seven.mfu["update"]
    lines.append(row("verl, 9B VLM, 8 x H800: old and reference logprobs, % of step", 57, share))
    lines.append(row("verl, 9B VLM, 8 x H800: MFU, %", 2.5, mfu))
    for gpu in ("a100", "h100"):
        found = example(gpu)
        without = found.step_seconds - found.seconds["pass2"]
        name = f"Vision-SR1 7B, 8 x 80 GB, if {gpu.upper()}"
        overhead = 100 * found.seconds["pass2"] / without
        lines.append(row(f"{name}: step without pass 2, s", 10.5 * 3600 / 20, without))
        lines.append(row(f"{name}: overhead of pass 2, %", 24, overhead))
    larger = example("h100", "32b", engine=8, tensor=8)
    lines.append(range_row("weight sync 7B, s", 0.02, 6, seven.seconds["sync"]))
    lines.append(range_row("weight sync 30B, s (32B planned)", 0.7, 16, larger.seconds["sync"]))
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
