"""Two data-parallel ranks over NCCL: traffic of gradients and weights, and an update's numbers.

The ranks run this file, with one GPU each, or on the same GPU where NCCL allows it (it refuses by
default: "Duplicate GPU detected"); on a CPU over gloo. They hold the model as `step` does.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_sr1.gpu_checks.bench import Bench
from megatron_sr1.gpu_checks.rows import SKIPPED, Row, at_least, at_most, fact
from megatron_sr1.gpu_checks.runner import environment
from megatron_sr1.gpu_checks.training import SAME, Step
from megatron_sr1.runtime.signals import end_with

NUM_RANKS = 2
NVLINK_RATE, PCIE_RATE = 100e9, 5e9
"""Least rates of a reduce-scatter or all-gather, bytes per second, with a GPU for each rank."""
REFUSAL = "Duplicate GPU detected"


def two_ranks(bench: Bench) -> Iterator[Row]:
    """Compare an update of two ranks with that of one, and measure their collectives."""
    alone = Step(bench, bench.config()).first
    bench.release()
    result = bench.directory / "ranks.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={NUM_RANKS}", __file__, bench.kind]
    command += [str(bench.directory), str(bench.model_dir), str(result)]
    done = subprocess.run(
        command,
        env=environment(NCCL_DEBUG="WARN"),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        preexec_fn=partial(end_with, os.getpid()),
    )
    sys.stdout.write(done.stdout)  # the log
    if done.returncode:
        last = next((x for x in reversed(done.stdout.splitlines()) if "Error" in x), "see the log")
        if REFUSAL not in done.stdout:
            raise RuntimeError(f"the ranks ended with {done.returncode}: {last.strip()}")
        yield Row("two ranks on one GPU", SKIPPED, note="NCCL refuses: it wants two GPUs")
        return
    found = json.loads(result.read_text())
    wrong = "the ranks' gradients are not those of all samples: do not train on several GPUs"
    for name in ("loss", "grad_norm"):
        off = abs(found["first"][name] / alone[name] - 1)
        yield at_most(f"first {name}, off one rank's", off, SAME, wrong)
    yield fact("seconds of an update, half of the samples a rank", found["seconds"])
    has_two = bench.kind == "cuda" and torch.cuda.device_count() >= NUM_RANKS
    rate = NVLINK_RATE if has_two and torch.cuda.can_device_access_peer(0, 1) else PCIE_RATE
    for name, (size, seconds) in found["collectives"].items():
        slow = "the GPUs are not connected as NCCL expects: see `nvidia-smi topo -m`"
        note, measured = f"{size:,} bytes", size / seconds / 1e9
        if has_two:
            yield at_least(name, measured, rate / 1e9, slow, "GB/s", note)
        else:
            yield fact(name, measured, "GB/s", note)


def main(kind: str, directory: str, model: str, result: str) -> None:
    """Run a rank; the first one writes the result."""
    end_with(os.getppid())
    if kind == "cuda":  # ranks share a GPU if there is one only
        os.environ["LOCAL_RANK"] = str(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    bench = Bench(kind, Path(directory), Path(model))
    groups, samples = bench.groups, bench.samples()
    step = Step(bench, bench.config(), samples[groups.data.rank :: groups.data.size])
    found: dict[str, Any] = {"first": step.first, "seconds": step.seconds(), "collectives": {}}
    number = sum(p.numel() for p in step.actor.chunks[0].parameters())
    number -= number % NUM_RANKS
    gradients, weights = (
        torch.ones(number, dtype=dtype, device=bench.device)
        for dtype in (torch.float32, torch.bfloat16)
    )
    own_gradients, own_weights = (
        whole[: number // NUM_RANKS].clone() for whole in (gradients, weights)
    )
    collectives: dict[str, tuple[torch.Tensor, Callable[[], Any]]] = {
        "reduce-scatter of gradients": (
            gradients,
            lambda: dist.reduce_scatter_tensor(own_gradients, gradients),
        ),
        "all-gather of weights": (
            weights,
            lambda: dist.all_gather_into_tensor(weights, own_weights),
        ),
    }
    for name, (whole, collective) in collectives.items():
        collective()
        size = whole.numel() * whole.element_size()
        found["collectives"][name] = size, bench.seconds(collective)
    if groups.world.rank == 0:
        Path(result).write_text(json.dumps(found))
    dist.barrier()


if __name__ == "__main__":
    main(*sys.argv[1:])
