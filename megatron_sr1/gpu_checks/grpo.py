"""Two stages from end to end, as a user starts them: a short cold start, then GRPO.

Data and model are the demo's digits; the cold start is just long enough for responses with a
description, so that both passes run. The numbers are those of `metrics.jsonl`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from megatron_sr1.demo.demo import COLD_START, CONFIG
from megatron_sr1.demo.digits import corpus_texts, make_digits
from megatron_sr1.demo.tiny_model import make_tiny_model
from megatron_sr1.gpu_checks.bench import Bench
from megatron_sr1.gpu_checks.rows import Row, at_least, at_most, fact
from megatron_sr1.gpu_checks.runner import environment
from megatron_sr1.observability.metrics import read_lines
from megatron_sr1.runtime.signals import end_with

COLD_STEPS, GRPO_STEPS = 120, 4
REMAINDER = 0.15
"""Share of a step outside of its phases; a step of this model is short."""
MISMATCH = 1.0
"""Largest |engine - actor| of a sampled token's logprob in bfloat16, nats."""


def run(bench: Bench) -> Iterator[Row]:
    """Train twice in processes of their own; report the last GRPO step."""
    folder = bench.directory / "grpo"
    make_digits(folder / "data", 1, num_train=512, num_eval=16, num_cold_start=2048)
    make_tiny_model(folder / "model", corpus_texts())
    shared = [
        f"launch.device={bench.kind}",
        "launch.num_processes=1",
        *("checkpoint.every_steps=0", "evaluation.sets=", "logging.progress=false"),
        "model.dtype=bfloat16" if bench.kind == "cuda" else "model.dtype=float32",
    ]
    if bench.kind == "cuda":
        # In bfloat16 the bounds of float32 do not hold; CUDA graphs are the check of the engine's.
        shared += ["rollout.mismatch_bound=0", "rollout.canary_bound=0"]
        shared += ["rollout.enforce_eager=true"]
    cold, learned = folder / "cold_start", folder / "grpo"
    train(
        bench,
        cold,
        *COLD_START,
        f"optimizer.num_steps={COLD_STEPS}",
        f"model.path={folder / 'model'}",
        f"data.train={folder / 'data' / 'cold_start'}",
        *shared,
    )
    yield fact("loss of the cold start", read_lines(cold / "metrics.jsonl")[-1]["actor/loss"])
    train(
        bench,
        learned,
        f"optimizer.num_steps={GRPO_STEPS}",
        f"model.path={cold / 'hf'}",
        f"data.train={folder / 'data' / 'train'}",
        *shared,
    )
    steps = read_lines(learned / "metrics.jsonl")
    wrong = "steps are missing from metrics.jsonl"
    yield at_least("GRPO steps", len(steps), GRPO_STEPS, wrong)
    yield from step_rows(steps[-1])


def step_rows(metrics: dict[str, Any]) -> Iterator[Row]:
    """Name the phases of a step, and what shows that engine and actor agree."""
    whole = metrics["time/step_seconds"]
    phases = {
        name.removeprefix("time/").removesuffix("_seconds"): value
        for name, value in metrics.items()
        if name.startswith("time/") and name != "time/step_seconds"
    }
    ordered = sorted(phases.items(), key=lambda item: -item[1])
    yield fact("seconds of a step", whole, note=", ".join(f"{n} {t:.3g}" for n, t in ordered))
    wrong = "the host works between the phases: see logging.profile_steps"
    yield at_most("share outside of phases", 1 - sum(phases.values()) / whole, REMAINDER, wrong)
    wrong = "no description was read: pass 2 did not run"
    yield at_least("tokens of pass 2", metrics["rollout/reading_tokens"], 1, wrong)
    wrong = "engine and actor disagree on the tokens that they train on"
    yield at_most("engine and actor", metrics["mismatch/abs_max"], MISMATCH, wrong, "nats")
    for name in ("memory/gpu_peak_gib", "memory/host_peak_gib"):
        if name in metrics:
            yield fact(name, metrics[name], "GiB")


def train(bench: Bench, output: Path, *settings: str) -> None:
    """Run the command line; what it prints goes to the log. Raise if it fails."""
    command = [sys.executable, "-m", "megatron_sr1", "train", str(CONFIG), *settings]
    command.append(f"output={output}")
    end = partial(end_with, os.getpid())
    done = subprocess.run(command, env=environment(), stdin=subprocess.DEVNULL, preexec_fn=end)
    if done.returncode:
        raise RuntimeError(f"`megatron-sr1 train` for {output.name} ended with {done.returncode}")
