"""The engine's part of the benchmark, for one model: schedules of the two passes, and weight sync.

Reads a Hugging Face directory of a policy that writes descriptions, and shards of the digits;
writes a JSON file. Each schedule rolls out the same 256 responses (32 prompts x 8) with the same
seeds at temperature 1 until they end by themselves or reach the limit, which is the same for both
passes, with slots for all of both; a sync before each clears every cache. Steps are recorded and
compared with what engine_steps.py simulates from the lengths. One process, started by bench.py,
which sets OMP_NUM_THREADS.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_sr1.checkpoint.hf import export_weights
from megatron_sr1.config.loading import load_config
from megatron_sr1.config.rollout import RolloutConfig
from megatron_sr1.records import Prompt, Rollout
from megatron_sr1.rewards.response import find_description
from megatron_sr1.rollout.readings import RolloutHooks
from megatron_sr1.rollout.two_pass import roll_out
from megatron_sr1.runtime.rng import request_seed
from megatron_sr1.stages import start_ranks
from megatron_sr1.trainer.actor import load_actor_model
from megatron_sr1.trainer.samples import Samples, make_processor
from megatron_sr1.trainer.sync import start_engine
from tools.engine_steps import SCHEDULES, Job, Limits, jobs_of, recorded, simulate

ROOT = Path(__file__).resolve().parent.parent
NUM_PROMPTS, SAMPLES = 32, 8
CAP_TOKENS = 64
SEEDS = (1, 2, 3)
REPEATS = 5
PASS2 = {"one": None, "barrier": "barrier", "forked": "fork"}


class Bench:
    """Actor, engine and data of one model on this process."""

    def __init__(self, model: str, data: str, directory: str) -> None:
        """Load everything, as a GRPO run on one rank would."""
        slots = 2 * NUM_PROMPTS * SAMPLES
        config = load_config(
            ROOT / "examples/digits_cpu.yaml",
            [
                *(
                    f"model.path={model}",
                    f"data.train={data}",
                    "evaluation.sets=",
                    f"output={directory}",
                ),
                *(f"rollout.max_num_seqs={slots}", "rollout.kv_cache_gib=1"),
                *("launch.num_processes=1", "launch.threads=2"),
                f"rollout.max_response_tokens={CAP_TOKENS}",
                f"rollout.max_reading_tokens={CAP_TOKENS}",
            ],
        )
        self.groups = start_ranks(config)
        self.processor = make_processor(config)
        self.samples = Samples(config, data, self.processor)
        self.chunks, self.hf_config, _ = load_actor_model(config, self.groups)
        self.engine = start_engine(config, self.groups, self.processor)
        self.limits = Limits(slots, 32768, 16, chunked=False)  # as vllm_api.py sets them on a CPU
        self.num_syncs = 0

    def weights(self) -> Iterable[tuple[str, Any]]:
        """Yield the actor's tensors, each made when it is requested."""
        return export_weights(self.chunks, self.hf_config, self.groups)

    def sync(self) -> None:
        """Stream the actor's weights into the engine."""
        self.num_syncs += 1
        self.engine.sync(self.weights(), self.num_syncs)

    def roll(self, schedule: str, seed: int) -> dict[str, Any]:
        """Roll out one step under a schedule: rollouts, statistics, recorded steps, prompts."""
        first = (seed - 1) * NUM_PROMPTS
        prompts = [self.samples.prompt(index) for index in range(first, first + NUM_PROMPTS)]
        kind = PASS2[schedule]
        self.sync()
        with recorded(self.engine) as steps:
            rollouts, stats = roll_out(
                self.engine,
                prompts,
                RolloutConfig(
                    samples_per_prompt=SAMPLES,
                    max_response_tokens=CAP_TOKENS,
                    pass2=kind or "fork",
                    pass2_temperature=1.0,
                    max_reading_tokens=CAP_TOKENS,
                ),
                RolloutHooks(
                    find_description,
                    self.samples.reading_prompts if kind else None,
                    lambda index, sample, part: request_seed(seed, 0, index, sample, part),
                ),
            )
        return {"rollouts": rollouts, "stats": stats, "steps": steps, "prompts": prompts}

    def jobs(self, rollouts: Sequence[Rollout], prompts: Sequence[Prompt]) -> list[Job]:
        """Return the lengths of rollouts with both passes, as `simulate` takes them."""
        readings = self.samples.reading_prompts
        return jobs_of(rollouts, prompts, readings, find_description, self.engine.decode)


def measure_schedules(bench: Bench) -> dict[str, Any]:
    """Return steps, median seconds and lengths of each schedule, for each seed."""
    bench.roll("forked", SEEDS[0])  # kernels warm up
    found = []
    for seed in SEEDS:
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in SCHEDULES}
        for _ in range(REPEATS):  # in turn, so that a disturbed machine disturbs all three
            for name in SCHEDULES:
                runs[name].append(bench.roll(name, seed))
        barrier, forked = runs["barrier"][0], runs["forked"][0]
        same = tokens_of(barrier["rollouts"]) == tokens_of(forked["rollouts"])
        jobs = bench.jobs(forked["rollouts"], forked["prompts"])
        one: dict[str, Any] = {"seed": seed, "same_tokens": same, "lengths": lengths(jobs)}
        for name, tried in runs.items():
            stats, steps = tried[0]["stats"], tried[0]["steps"]
            all_seconds = [t["stats"].seconds for t in tried]
            seconds = statistics.median(all_seconds)
            tokens = stats.pass1_tokens + stats.pass2_tokens
            one[name] = {
                "engine_steps": stats.engine_steps,
                "seconds": seconds,
                "all_seconds": all_seconds,
                "tokens": tokens,
                "tokens_per_second": tokens / seconds,
                "simulated_equals_recorded": simulate(jobs, name, bench.limits) == steps,
                "steps": [asdict(step) for step in steps],
            }
        found.append(one)
    return {"seeds": found}


def tokens_of(rollouts: Sequence[Rollout]) -> list[Any]:
    """Return the tokens of both passes."""
    return [
        (r.completion.token_ids, r.reading and [a.token_ids for a in r.reading.answers])
        for r in rollouts
    ]


def lengths(jobs: Sequence[Job]) -> dict[str, Any]:
    """Return quantiles of the sampled lengths, tokens, and the number of descriptions read."""

    def quantiles(values: list[int]) -> dict[str, float]:
        cuts = statistics.quantiles(values, n=100, method="inclusive")
        mean = statistics.mean(values)
        return {"mean": mean, "p50": cuts[49], "p99": cuts[98], "max": max(values)}

    read = {job.reading: job for job in jobs if job.description_tokens}
    return {
        "response": quantiles([job.response_tokens for job in jobs]),
        "description": quantiles([j.description_tokens for j in jobs if j.description_tokens]),
        "reading": quantiles([job.reading_tokens for job in read.values()]),
        "descriptions": sum(job.description_tokens > 0 for job in jobs),
        "distinct_readings": len(read),
    }


def measure_sync(bench: Bench, times: int = 10) -> dict[str, float]:
    """Measure a sync and a plain copy of the same bytes, and the peak of a sync's extra memory.

    Extra memory is what torch's allocator handed out during a sync and had not taken back.
    """
    import torch

    bench.sync()
    seconds = statistics.median(timed(bench.sync) for _ in range(times))
    tensors = [tensor.detach().clone() for _, tensor in bench.weights()]
    targets = [torch.empty_like(tensor).zero_() for tensor in tensors]

    def copy() -> None:
        for target, tensor in zip(targets, tensors, strict=True):
            target.copy_(tensor)

    return {
        "bytes": sum(tensor.numel() * tensor.element_size() for tensor in tensors),
        "seconds": seconds,
        "memcpy_seconds": statistics.median(timed(copy) for _ in range(times)),
        "extra_bytes_peak": extra_bytes_peak(bench.sync),
        "largest_layer_bytes": largest_layer_bytes(bench.weights()),
    }


def timed(function: Callable[[], object]) -> float:
    """Return the seconds of a call."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def extra_bytes_peak(function: Callable[[], object]) -> int:
    """Return the peak of what torch's CPU allocator has given out since the start of a call.

    The profiler knows no block from before it started, so that a weight that is replaced by a new
    one would count twice; a first call makes all of them known.
    """
    from torch.profiler import ProfilerActivity, profile, record_function

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        function()
        with record_function("measured"):
            function()
    events = sorted(profiled.profiler.kineto_results.events(), key=lambda e: e.start_ns())
    held = before = peak = 0
    for event in events:
        if event.name() == "measured":
            before = peak = held
        elif event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak - before


def largest_layer_bytes(weights: Iterable[tuple[str, Any]]) -> int:
    """Return the size of the engine's largest layer, where q, k and v are one, as gate and up."""
    sizes: dict[str, int] = {}
    for name, tensor in weights:
        layer = re.sub(r"\b([qkv]|gate|up)_proj\b", "fused", name.rpartition(".")[0])
        if re.search(r"\b[qkv]_proj\b", name):
            layer += " qkv"
        sizes[layer] = sizes.get(layer, 0) + tensor.numel() * tensor.element_size()
    return max(sizes.values())


def main() -> int:
    """Measure one model and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--result", type=Path, required=True)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        bench = Bench(arguments.model, arguments.data, directory)
        result = {"schedules": measure_schedules(bench), "sync": measure_sync(bench)}
    arguments.result.write_text(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
