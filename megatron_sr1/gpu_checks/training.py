"""An SFT step: memory beside the planner's, MFU, time by kernel class; other settings; checkpoints.

The step is `trainer.step.update` on packed rows, as a run does it, without reading data.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_sr1.checkpoint.loading import load_checkpoint
from megatron_sr1.checkpoint.saving import SaveQueue
from megatron_sr1.config.run import Config
from megatron_sr1.config.training import CheckpointConfig
from megatron_sr1.gpu_checks.bench import GIB, Bench
from megatron_sr1.gpu_checks.device import known_gpu
from megatron_sr1.gpu_checks.kernels import shortened, timeline
from megatron_sr1.gpu_checks.rows import Row, at_least, at_most, fact
from megatron_sr1.model import flops
from megatron_sr1.planning.actor_time import ActorCost
from megatron_sr1.planning.costs import RESERVED_BYTES
from megatron_sr1.planning.layout import Layout
from megatron_sr1.planning.memory import rank_memory
from megatron_sr1.planning.workload import PlannedRun, planned_run
from megatron_sr1.records import PackedBatch, TrainSample
from megatron_sr1.runtime.gpus import GPUS
from megatron_sr1.trainer.actor import Actor
from megatron_sr1.trainer.sft import token_loss
from megatron_sr1.trainer.step import update

MFU = 0.3
IDLE_SHARE = 0.05
MEMORY_MARGIN = 0.15
TIME_MARGIN = 2.0
SAME = 2e-2
"""Relative difference of loss and gradient norm that bfloat16 and kernels' order explain."""
DISK_RATE = 0.2e9
"""Bytes per second; less delays every save."""


class Step:
    """An actor with its rows.

    Attributes:
        first: what the first update measured.
        before_bytes: allocated on the device before the actor was loaded.
    """

    def __init__(
        self, bench: Bench, config: Config, samples: list[TrainSample] | None = None
    ) -> None:
        """Load the actor and do one update, which warms up and makes the optimizer's state."""
        bench.release()
        self.bench, self.config = bench, config
        self.before_bytes = allocated(bench)
        self.samples = samples or bench.samples()
        self.batches: Sequence[PackedBatch] = bench.rows(self.samples)
        self.actor: Actor = bench.actor(config)
        self.first = self.update()

    def update(self) -> dict[str, float]:
        """Do one update."""
        return update(self.actor, self.batches, token_loss, 1.0)

    def seconds(self) -> float:
        """Return the median seconds of an update."""
        return self.bench.seconds(self.update, rounds=self.bench.sizes.num_steps)

    def peak_bytes(self) -> int:
        """Return the peak during an update, without what was there before."""
        if self.bench.kind == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.update()
            return torch.cuda.max_memory_allocated() - self.before_bytes
        return 0

    def planned(self) -> PlannedRun:
        """Return the step for the planner, with the lengths that it has."""
        gpu = known_gpu(self.bench) or GPUS["h100"]
        patches = sum(t * h * w for s in self.samples for t, h, w in s.image_grid_thw)
        merged = patches / self.bench.hf_config.vision.spatial_merge_size**2
        responses = sum(int(s.loss_mask.sum()) for s in self.samples)
        tokens, number = sum(len(s.token_ids) for s in self.samples), len(self.samples)
        lengths = {
            "text_tokens": (tokens - merged - responses) / number,
            "image_tokens": merged / number,
            "response_tokens": responses / number,
        }
        longest = max(row.input_ids.shape[1] for row in self.batches)
        data = replace(self.config.data, pack_tokens=longest, max_prompt_tokens=longest)
        config = replace(self.config, data=data)
        return planned_run(config, self.bench.hf_config, gpu, lengths)


def allocated(bench: Bench) -> int:
    """Return the bytes that torch's allocator has given out on the device; 0 on a CPU."""
    return torch.cuda.memory_allocated() if bench.kind == "cuda" else 0


def step(bench: Bench) -> Iterator[Row]:
    """Measure an SFT step in bfloat16 with the default settings."""
    run = default_step(bench)
    seconds = bench.known["seconds"]
    work = trained_flops(bench, run.samples)
    gpu = known_gpu(bench)
    peak = gpu.peak_flops if gpu else bench.known.get("matmul_rate")
    tokens = sum(len(s.token_ids) for s in run.samples)
    yield fact("tokens a second", tokens / seconds, note=f"{tokens} tokens, {seconds:.4g} s")
    if peak and bench.kind == "cuda":
        slow = "see the time by kernel class, and the share of time without a kernel"
        of = gpu.name if gpu else "the measured product's rate"
        yield at_least("MFU of an update", work / seconds / peak, MFU, slow, note=f"of {of}")
    planned = run.planned()
    yield from memory_rows(run, planned)
    if gpu:
        cost = ActorCost(planned, Layout())
        expected = cost.update_seconds(rank_memory(planned, Layout(), 0, None).static)
        wrong = "the planner's times do not hold here; send this table"
        yield at_most("seconds over the planner's", seconds / expected, TIME_MARGIN, wrong)
    yield from kernel_rows(run, seconds)
    last = run.update()["loss"]
    wrong = "updates do not lower the loss of the batch they are made from"
    yield at_most("loss after updates, over the first", last / run.first["loss"], 1.0, wrong)


def memory_rows(run: Step, planned: PlannedRun) -> Iterator[Row]:
    """Compare what weights, gradients and state take, and the peak, with the planner's bytes."""
    if run.bench.kind != "cuda":
        return
    held, peak = allocated(run.bench) - run.before_bytes, run.peak_bytes()
    layout = Layout(recompute=run.config.model.recompute)
    memory = rank_memory(planned, layout, 0, None)
    wrong = "`megatron-sr1 plan` is wrong about memory here; send this table"
    for name, found, expected in (
        ("weights, gradients and optimizer state", held, memory.static.device),
        ("peak of an update", peak, memory.training - RESERVED_BYTES),
    ):
        note = f"planned {expected / GIB:.2f} GiB"
        yield fact(name, found / GIB, "GiB", note)
        off = abs(found / expected - 1)
        yield at_most(f"{name}: off the plan", off, MEMORY_MARGIN, wrong)


def kernel_rows(run: Step, seconds: float) -> Iterator[Row]:
    """Name the share of each class of kernels, and of the time without any."""
    found = timeline(run.update, run.bench.kind)
    for name, taken in found.by_class.items():
        if taken > 0.01 * seconds:
            yield fact(f"share of {name}", taken / seconds)
    largest = (f"{shortened(name)} {1000 * t:.3g} ms" for name, t in found.largest.items())
    yield fact("largest kernels beside products and attention", "; ".join(largest))
    if run.bench.kind == "cuda":
        slow = "the GPU waits for Python: profile the step (logging.profile_steps)"
        yield at_most("share without a kernel", 1 - found.busy / seconds, IDLE_SHARE, slow)


def trained_flops(bench: Bench, samples: Sequence[TrainSample]) -> float:
    """Return the operations of an update as `perf/update_mfu` counts them."""
    total = 0.0
    for sample in samples:
        text = flops.text(bench.hf_config, len(sample.token_ids), int(sample.loss_mask.sum()))
        towers = (
            flops.vision(bench.hf_config, t * h * w, h * w) for t, h, w in sample.image_grid_thw
        )
        total += 3 * (text.total + sum(tower.total for tower in towers))
    return total


def default_step(bench: Bench) -> Step:
    """Run the step with the default settings; its process keeps what variants compare with."""
    run = Step(bench, bench.config())
    bench.known |= {key: run.first[key] for key in ("loss", "grad_norm")}
    bench.known["seconds"] = run.seconds()
    return run


def variant(bench: Bench, setting: str) -> Iterator[Row]:
    """Measure an SFT step with another setting; it must compute what the default one does."""
    if "seconds" not in bench.known:  # another process measured it
        default_step(bench)
    run = Step(bench, bench.config(setting))
    make_room = run.config.rollout.make_room

    def update_after_leaving() -> dict[str, float]:
        run.actor.offload(make_room)
        return run.update()  # it restores

    if setting.startswith("rollout.make_room"):
        before = allocated(bench)
        run.actor.offload(make_room)
        freed = before - allocated(bench)
        if bench.kind == "cuda":
            yield fact("freed for the engine", freed / GIB, "GiB")
        run.actor.restore()
        seconds = bench.seconds(update_after_leaving, rounds=bench.sizes.num_steps)
    else:
        seconds = run.seconds()
        yield from memory_rows(run, run.planned())
    yield fact("seconds of an update", seconds)
    for name in ("loss", "grad_norm"):
        off = abs(run.first[name] / bench.known[name] - 1)
        wrong = f"{setting} changes what an update computes: do not use it here"
        yield at_most(f"first {name}, off the default's", off, SAME, wrong)
    yield fact("seconds over the default's", seconds / bench.known["seconds"])


def checkpoint(bench: Bench) -> Iterator[Row]:
    """Save a trained actor, change it, load it again."""
    folder = bench.directory / "checkpoints"
    run = Step(bench, bench.config())
    kept = [p.detach().clone() for p in run.actor.chunks[0].parameters()]
    queue = SaveQueue(folder, CheckpointConfig())
    source = run.actor.source.hf_files
    save: Any = lambda: queue.add(1, run.actor.trained, {"n": 1}, source)  # noqa: E731
    seconds = bench.seconds(save, rounds=1)
    size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    yield _disk_row(bench, "save", size, seconds)
    expected = run.update()
    with torch.no_grad():
        for parameter in run.actor.chunks[0].parameters():
            parameter.zero_()
    seconds = bench.seconds(lambda: load_checkpoint(folder, run.actor.trained), rounds=1)
    yield _disk_row(bench, "load and verify", size, seconds)
    changed = sum(
        not torch.equal(old, new)
        for old, new in zip(kept, run.actor.chunks[0].parameters(), strict=True)
    )
    wrong = "a resumed run would not continue where it stopped"
    yield at_most("parameters that come back changed", changed, 0, wrong)
    again = run.update()
    off = max(abs(again[name] / expected[name] - 1) for name in ("loss", "grad_norm"))
    yield at_most("update after loading, off the one after saving", off, SAME, wrong)
    shutil.rmtree(folder)


def _disk_row(bench: Bench, name: str, size: int, seconds: float) -> Row:
    note, rate = f"{size / GIB:.2f} GiB", size / seconds / 1e9
    if bench.kind == "cpu":  # small files: their number counts
        return fact(name, rate, "GB/s", note)
    slow = f"{bench.directory} is slow: save rarely, or set checkpoint.asynchronous=true"
    return at_least(name, rate, DISK_RATE / 1e9, slow, "GB/s", note)
