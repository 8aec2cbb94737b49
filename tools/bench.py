"""The benchmark: what the second pass costs, in engine steps, seconds and on a modelled GPU.

For the demo's model and for one of hidden size 512: one pass, two passes behind a barrier and two
passes forked on the real engine; weight sync beside a plain copy of the same bytes; a GRPO step
beside TRL's. Then a declared workload on the cost model of an H100. Out: bench.json, and tables on
the standard output; docs/bench.md holds those of one run. The status is 1 if a bound does not hold.
Without a finished demo in --demo, it runs one (minutes).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tools.bench_tables import (  # noqa: E402
    gpu_seconds,
    gpu_tables,
    model_tables,
    verdicts,
)
from tools.schedules import SCHEDULES  # noqa: E402

WIDE_HIDDEN = 512
COLD_START = {
    "stage": "sft",
    "checkpoint.every_steps": 0,
    "data.prompts_per_step": 64,
    "optimizer.learning_rate": 1e-3,
    "optimizer.min_learning_rate": 1e-4,
    "optimizer.warmup_steps": 20,
    "data.eval": "",
}


def megatron_sr1(*arguments: str) -> None:
    """Run the command line in the repository."""
    run([sys.executable, "-m", "megatron_sr1", *arguments], threads=1)


def run(command: list[str], threads: int) -> None:
    """Run a program to its end; what it writes goes to the standard error."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
    subprocess.run(command, check=True, cwd=ROOT, env=environment, stdout=sys.stderr)


def prepare(demo: Path, wide_steps: int) -> dict[str, dict[str, Path]]:
    """Train what is not there yet.

    Returns:
        name of a model -> "policy", whose schedules are measured, and "start" of the GRPO steps.
    """
    if not (demo / "summary.json").is_file():
        megatron_sr1("demo", "--output", str(demo))
    wide = wide_cold_start(demo, wide_steps)
    return {
        "demo": {"policy": demo / "vision_sr1" / "hf", "start": demo / "cold_start" / "hf"},
        "wide": {"policy": wide, "start": wide},
    }


def wide_cold_start(demo: Path, num_steps: int) -> Path:
    """The wide model after supervised fine-tuning on the demo's cold start, made once."""
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
        megatron_sr1("train", "examples/digits_cpu.yaml", *overrides)
    return directory


def measure(name: str, models: dict[str, Path], demo: Path, trl: list[str]) -> dict[str, Any]:
    """Everything of one model; kept beside the demo, as the tables need more than bench.json."""
    data = str(demo / "data" / "train")
    found: dict[str, Any] = {}
    tools = {
        "engine": ["tools/bench_engine.py", "--model", str(models["policy"])],
        "step": ["tools/compare_trl.py", "--model", str(models["start"]), *trl],
    }
    for part, command in tools.items():
        result = demo / "bench" / f"{name}_{part}.json"
        result.parent.mkdir(exist_ok=True)
        run([sys.executable, *command, "--data", data, "--result", str(result)], threads=2)
        found[part] = json.loads(result.read_text())
    return found


def summary(found: dict[str, Any], gpu: dict[str, Any]) -> dict[str, Any]:
    """One model's part of bench.json: means over the seeds."""
    seeds = found["engine"]["schedules"]["seeds"]
    sync = found["engine"]["sync"]

    def mean(key: str) -> dict[str, float]:
        return {name: statistics.mean(seed[name][key] for seed in seeds) for name in SCHEDULES}

    return {
        "engine_steps": mean("engine_steps"),
        "seconds": mean("seconds"),
        "roofline": gpu,
        "step_seconds": {
            side: found["step"]["median_step_seconds"][side] for side in ("ours", "trl")
        },
        "sync": {
            key: sync[key] for key in ("bytes", "seconds", "memcpy_seconds", "extra_bytes_peak")
        },
    }


def main() -> int:
    """Prepare, measure, write bench.json, print tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--demo", type=Path, default=ROOT / "runs" / "demo", help="demo's folder; made if absent")
    add("--output", type=Path, default=ROOT / "bench.json")
    add("--wide-steps", type=int, default=400, help="cold start of the wide model, steps")
    add("--trl-steps", type=int, default=6, help="of a side in a round, the first left out")
    add("--trl-rounds", type=int, default=3, help="in which the sides take turns")
    add("--roofline-only", action="store_true", help="print the cost model's tables and stop")
    arguments = parser.parse_args()
    gpu = gpu_seconds()
    print(gpu_tables(gpu), flush=True)
    if arguments.roofline_only:
        return 0
    demo = arguments.demo.resolve()
    models = prepare(demo, arguments.wide_steps)
    trl = ["--steps", str(arguments.trl_steps), "--rounds", str(arguments.trl_rounds)]
    found = {name: measure(name, models[name], demo, trl) for name in models}
    parts = {name: summary(found[name], gpu["declared"]) for name in found}
    arguments.output.write_text(json.dumps({**parts["demo"], "wide": parts["wide"]}, indent=2))
    for name in found:
        print(model_tables(name, found[name]))
    checked = verdicts(found, gpu["declared"])
    for claim, holds in checked.items():
        print(f"{'holds' if holds else 'DOES NOT HOLD'}: {claim}")
    return 0 if all(checked.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
