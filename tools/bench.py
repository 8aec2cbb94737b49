"""The benchmark: what the second pass costs, in engine steps, seconds and on a modelled GPU.

For the demo's model and for one of hidden size 512: one pass, two passes with a barrier between
them and two passes forked on the real engine; weight sync beside a plain copy of the same bytes; a
GRPO step beside TRL's. An update at a 3B's widths beside transformers' Trainer. Host time with a
model of tiny kernels. Grading while the engine samples, and afterwards. Then a declared workload on
the cost model of an H100. Writes bench.json and prints tables; docs/bench.md holds those of one
run. The exit status is 1 if a limit is exceeded.
Without a finished demo in --demo, it runs one (minutes).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.bench_grading import LIMITS as GRADING_LIMITS
from tools.bench_host import LIMITS as HOST_LIMITS
from tools.bench_roofline import SEQUENCES, Gpu, gpu_seconds, gpu_tables, share, table
from tools.engine_steps import SCHEDULES

ROOT = Path(__file__).resolve().parent.parent
WIDE_HIDDEN = 512
COLD_START = {
    "stage": "sft",
    "checkpoint.every_steps": 0,
    "data.prompts_per_step": 64,
    "optimizer.learning_rate": 1e-3,
    "optimizer.min_learning_rate": 1e-4,
    "optimizer.warmup_steps": 20,
    "evaluation.sets": "",
}
GPU_PHASES = ("canary", "pass1", "pass2", "wait", "old_logprobs", "reference", "update")
"""Phases of a step in which engine or actor compute; in `wait`, another replica's engine does."""
GAP_LIMIT = 0.03
"""Largest share of a step outside of these phases."""
TRL_LIMIT, WIDTHS_LIMIT = 0.6, 1.5
"""Most seconds of a step relative to TRL's; fewest tokens a second relative to the Trainer's."""


def run(*arguments: str, threads: int = 1) -> None:
    """Run a Python program in the repository; its standard output goes to the standard error."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *arguments]
    subprocess.run(command, check=True, cwd=ROOT, env=environment, stdout=sys.stderr)


def prepare(demo: Path, wide_steps: int) -> dict[str, dict[str, Path]]:
    """Train what is missing.

    Returns:
        name of a model -> "policy", whose schedules are measured, and "start" of the GRPO steps.
    """
    if not (demo / "summary.json").is_file():
        run("-m", "megatron_sr1", "demo", "--output", str(demo))
    wide = wide_cold_start(demo, wide_steps)
    return {
        "demo": {"policy": demo / "vision_sr1" / "hf", "start": demo / "cold_start" / "hf"},
        "wide": {"policy": wide, "start": wide},
    }


def wide_cold_start(demo: Path, num_steps: int) -> Path:
    """Fine-tune the wide model on the demo's cold start, once; return its directory."""
    wide = demo / f"wide_{num_steps}"
    directory = wide / "cold_start" / "hf"
    if not (directory / "config.json").is_file():
        from megatron_sr1.demo.digits import corpus_texts
        from megatron_sr1.demo.tiny_model import make_tiny_model

        make_tiny_model(wide / "model", corpus_texts(), seed=1, hidden_size=WIDE_HIDDEN)
        settings = {
            **COLD_START,
            "model.path": wide / "model",
            "data.train": demo / "data" / "cold_start",
            "output": wide / "cold_start",
            "optimizer.num_steps": num_steps,
        }
        overrides = [f"{key}={value}" for key, value in settings.items()]
        run("-m", "megatron_sr1", "train", "examples/digits_cpu.yaml", *overrides)
    return directory


def measure(name: str, models: dict[str, Path], demo: Path, trl: list[str]) -> dict[str, Any]:
    """Measure one model."""
    data = ("--data", str(demo / "data" / "train"))
    tools = {
        "engine": ["tools/bench_engine.py", "--model", str(models["policy"])],
        "step": ["tools/compare_trl.py", "--model", str(models["start"]), *trl],
    }
    return {
        part: measured(demo, f"{name}_{part}", *command, *data, threads=2)
        for part, command in tools.items()
    }


def measure_host(directory: Path, rounds: int) -> dict[str, float]:
    """Measure host time, which needs no demo; the result is beside those of the models."""
    return measured(directory, "host", "tools/bench_host.py", "--rounds", str(rounds))


def measure_grading(directory: Path, rounds: int) -> dict[str, Any]:
    """Measure grading during and after pass 1, which needs no demo either."""
    return measured(directory, "grading", "tools/bench_grading.py", "--rounds", str(rounds))


def measured(directory: Path, name: str, *command: str, threads: int = 1) -> dict[str, Any]:
    """Run a tool that writes a result; it stays in the demo's directory, beside bench.json."""
    result = directory / "bench" / f"{name}.json"
    result.parent.mkdir(parents=True, exist_ok=True)
    run(*command, "--result", str(result), threads=threads)
    found: dict[str, Any] = json.loads(result.read_text())
    return found


def host_table(found: dict[str, float]) -> str:
    """Show the seconds of the main thread, their ratios, and the limits."""
    parts = {
        "one_pass": (
            "one pass, pixels included, / LLM.generate",
            "one_pass_seconds",
            "generate_seconds",
        ),
        "own_share": ("the loop's own part / vLLM's steps", "own_seconds", "vllm_seconds"),
        "images": ("a step's images, read ahead / not", "ahead_seconds", "serial_seconds"),
    }
    rows = [
        [text, f"{found[own]:.3f}", f"{found[other]:.3f}", f"{found[name]:.3f}", f"{limit:.2f}"]
        for name, limit in HOST_LIMITS.items()
        for text, own, other in [parts[name]]
    ]
    return table(["host time", "ours, s", "beside, s", "ratio", "limit"], rows)


def host_verdicts(found: dict[str, float]) -> dict[str, bool]:
    """Check the limits of host time."""
    return {
        f"host, {name}: {found[name]:.3f}, {limit:g}": found[name] <= limit
        for name, limit in HOST_LIMITS.items()
    }


def grading_line(found: dict[str, Any]) -> str:
    """Show the seconds of pass 1 and of grading, whether that begins after or during pass 1."""
    after, early = (
        f"{found[f'{when}_pass1_seconds']:.1f} + {found[f'{when}_reward_seconds']:.1f} s"
        for when in ("after", "early")
    )
    return (
        f"pass 1 + grading of 4,000 answers: graded afterwards {after}, while they are sampled "
        f"{early}; left after the last token {found['left_share']:.3f}, together "
        f"{found['step']:.3f}\n"
    )


def grading_verdicts(found: dict[str, Any]) -> dict[str, bool]:
    """Check the limits of grading."""
    return {
        f"grading, {name}: {found[name]:.3f}, {limit:g}": found[name] <= limit
        for name, limit in GRADING_LIMITS.items()
    }


def gap_share(phases: dict[str, float]) -> float:
    """Return the share of a step in which neither engine nor actor compute."""
    busy = sum(phases.get(f"time/{name}_seconds", 0.0) for name in GPU_PHASES)
    return 1 - busy / phases["time/step_seconds"]


def model_tables(name: str, found: dict[str, Any]) -> str:
    """Show one model's schedules and lengths by seed, its sync and its step."""
    seeds = found["engine"]["schedules"]["seeds"]
    rows = []
    for seed in seeds:
        steps = [str(seed[s]["engine_steps"]) for s in SCHEDULES]
        seconds = [f"{seed[s]['seconds']:.2f}" for s in SCHEDULES]
        rates = [f"{seed[s]['tokens_per_second']:.0f}" for s in SCHEDULES]
        extra = share({s: seed[s]["engine_steps"] for s in SCHEDULES})
        exact = all(seed[s]["simulated_equals_recorded"] for s in SCHEDULES)
        cells = [" / ".join(part) for part in (steps, seconds, rates)]
        flags = ["yes" if yes else "no" for yes in (seed["same_tokens"], exact)]
        rows.append([str(seed["seed"]), *cells, f"{extra:.2f}", *flags])
    head = ["seed", "engine steps", "seconds", "tokens/s", "share of extra steps", "same tokens"]
    parts = [f"### {name}: one / barrier / forked\n", table([*head, "simulated = recorded"], rows)]
    parts.append(table(["seed", "response", "description", "reading", "read"], _lengths(seeds)))
    ratios = sorted(forked_over_barrier(seeds))
    sync, step = found["engine"]["sync"], found["step"]
    medians, phases = step["median_step_seconds"], step["median_phase_seconds"]
    by_phase = ", ".join(
        f"{key.removeprefix('time/').removesuffix('_seconds')} {value:.2f}"
        for key, value in sorted(phases.items(), key=lambda item: -item[1])
    )
    parts += [
        f"seconds, forked / barrier, of neighbouring runs: median {statistics.median(ratios):.2f}, "
        f"from {ratios[0]:.2f} to {ratios[-1]:.2f}\n",
        f"sync: {sync['bytes']:,} bytes in {sync['seconds']:.4f} s, a plain copy of them in "
        f"{sync['memcpy_seconds']:.4f} s; {sync['extra_bytes_peak']:,} bytes beside the weights at "
        f"most, the engine's largest layer has {sync['largest_layer_bytes']:,}\n",
        f"a GRPO step: ours (two passes) {medians['ours']:.2f} s, TRL (one pass) "
        f"{medians['trl']:.2f} s, ratio {step['ratio']:.2f}, by round "
        f"{', '.join(f'{r:.2f}' for r in step['ratio_by_round'])}; by phase: {by_phase}\n",
    ]
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


def verdicts(models: dict[str, dict[str, Any]], gpu: Gpu) -> dict[str, bool]:
    """Check the limits: the demo's schedules by seed, the modelled GPU, syncs, gaps and a step."""
    checked, demo = {}, models["demo"]
    seeds = demo["engine"]["schedules"]["seeds"]
    for seed in seeds:
        steps = {s: seed[s]["engine_steps"] for s in SCHEDULES}
        claim = f"seed {seed['seed']}: {' / '.join(map(str, steps.values()))} engine steps"
        checked[f"{claim}, 0.4 of the extra"] = share(steps) <= 0.4
    for model, by_num in gpu.items():
        for num in SEQUENCES[:3]:
            part = share(by_num[str(num)])
            checked[f"{model}, {num} sequences: {part:.2f} of the extra time, 0.5"] = part <= 0.5
    rounds = statistics.median(forked_over_barrier(seeds))
    checked[f"wall time of the demo's rollouts, forked / barrier: {rounds:.2f}, 1"] = rounds <= 1
    for name, found in models.items():
        sync = found["engine"]["sync"]
        extra, layer = sync["extra_bytes_peak"], sync["largest_layer_bytes"]
        claim = f"{name}, sync: {extra:,} bytes at most beside the weights, 2 x {layer:,}"
        checked[claim] = extra <= 2 * layer
        gap = statistics.median(map(gap_share, found["step"]["phase_seconds_by_step"]))
        checked[f"{name}, share of a step in gaps: {gap:.3f}, {GAP_LIMIT:g}"] = gap <= GAP_LIMIT
        ratio = found["step"]["ratio"]
        claim = f"{name}, a step relative to TRL's: {ratio:.2f}, {TRL_LIMIT:g}"
        checked[claim] = ratio <= TRL_LIMIT
    return checked


def widths_verdicts(found: dict[str, Any]) -> dict[str, bool]:
    """Check the limit of an update at a 3B's widths."""
    claim = f"3B's widths, tokens a second over the Trainer's: {found['ratio']:.2f}"
    return {f"{claim}, at least {WIDTHS_LIMIT:g}": found["ratio"] >= WIDTHS_LIMIT}


def widths_line(found: dict[str, Any]) -> str:
    """Show the rates of an update at a 3B's widths."""
    ours, theirs = (statistics.median(rates) for rates in found["tokens_per_second"].values())
    return (
        f"an update at 3B's widths: ours {ours:.0f} tokens a second, transformers' Trainer "
        f"{theirs:.0f}, ratio {found['ratio']:.2f}, by round "
        f"{', '.join(f'{ratio:.2f}' for ratio in found['ratio_by_round'])}\n"
    )


def forked_over_barrier(seeds: Sequence[dict[str, Any]]) -> list[float]:
    """Return the ratios of the seconds of neighbouring runs, of all seeds."""
    runs = [[seed[s]["all_seconds"] for s in ("forked", "barrier")] for seed in seeds]
    return [forked / barrier for both in runs for forked, barrier in zip(*both, strict=True)]


def summary(found: dict[str, Any], gpu: dict[str, Any]) -> dict[str, Any]:
    """Return one model's part of bench.json: means over the seeds."""
    seeds = found["engine"]["schedules"]["seeds"]
    sync = found["engine"]["sync"]

    def mean(key: str) -> dict[str, float]:
        return {name: statistics.mean(seed[name][key] for seed in seeds) for name in SCHEDULES}

    kept = ("bytes", "seconds", "memcpy_seconds", "extra_bytes_peak")
    return {
        "engine_steps": mean("engine_steps"),
        "seconds": mean("seconds"),
        "roofline": gpu,
        "step_seconds": found["step"]["median_step_seconds"],
        "sync": {key: sync[key] for key in kept},
    }


def main() -> int:
    """Prepare, measure, write bench.json, print tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--demo", type=Path, default=ROOT / "runs" / "demo", help="demo; run if absent")
    add("--output", type=Path, default=ROOT / "bench.json")
    add("--wide-steps", type=int, default=400, help="steps of the wide model's cold start")
    add("--trl-steps", type=int, default=6, help="steps per side and round; the first is ignored")
    add("--trl-rounds", type=int, default=5, help="rounds; the sides take turns")
    add("--host-only", action="store_true", help="measure host time, check its limits and stop")
    add("--host-rounds", type=int, default=5)
    add("--grading-only", action="store_true", help="measure grading, check its limits and stop")
    add("--grading-rounds", type=int, default=3)
    add("--roofline-only", action="store_true", help="print the cost model's tables and stop")
    arguments = parser.parse_args()
    demo = arguments.demo.resolve()
    if not (arguments.host_only or arguments.grading_only):
        gpu = gpu_seconds()
        print(gpu_tables(gpu), flush=True)
    if arguments.roofline_only:
        return 0
    if not arguments.host_only:
        grading = measure_grading(demo, arguments.grading_rounds)
        print(grading_line(grading), flush=True)
    if arguments.grading_only:
        return report(grading_verdicts(grading))
    host = measure_host(demo, arguments.host_rounds)
    print(host_table(host), flush=True)
    print(f"One more live sequence: {1e6 * host['sequence_step_seconds']:.1f} us an engine step")
    if arguments.host_only:
        return report(host_verdicts(host))
    models = prepare(demo, arguments.wide_steps)
    trl = ["--steps", str(arguments.trl_steps), "--rounds", str(arguments.trl_rounds)]
    found = {name: measure(name, models[name], demo, trl) for name in models}
    widths = measured(demo, "widths", "tools/bench_widths.py", threads=2)
    parts = {name: summary(found[name], gpu["declared"]) for name in found}
    whole = {**parts["demo"], "wide": parts["wide"], "host": host, "widths": widths}
    whole["grading"] = grading
    arguments.output.write_text(json.dumps(whole, indent=2))
    for name in found:
        print(model_tables(name, found[name]))
    print(widths_line(widths))
    checked = {**verdicts(found, gpu["declared"]), **widths_verdicts(widths), **host_verdicts(host)}
    return report({**checked, **grading_verdicts(grading)})


def report(checked: dict[str, bool]) -> int:
    """Print which limits hold; return the exit status."""
    for claim, holds in checked.items():
        print(f"{'holds' if holds else 'DOES NOT HOLD'}: {claim}")
    return 0 if all(checked.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
