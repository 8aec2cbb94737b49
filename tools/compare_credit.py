"""Compare credit by span with scalar credit on the digits, over several seeds.

For each seed: the demo's shards, model and cold start, then the demo's GRPO once with each
`algorithm.credit` from that cold start, with the same steps, prompts and seeds, and the same
held-out questions with the same randomness. Prints Markdown tables. What is finished in --output is
not made again, so that an interrupted comparison can be continued.

Intervals are of 95 %: a seed's difference by its questions (paired, normal), the mean over the
seeds by Student's t. The second says what another seed would give; it is wide with three.
"""

from __future__ import annotations

import argparse
import math
import statistics
from pathlib import Path

from megatron_sr1.demo.demo import COLD_START, WAYS, prepare
from megatron_sr1.observability.metrics import read_lines
from megatron_sr1.report.verdicts import LABELS, paired
from megatron_sr1.rewards.score import VERDICTS, rate
from tools.bench import ROOT, run
from tools.bench_roofline import table

CREDITS = ("scalar", "span")
T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}  # Student's t, two-sided, by degrees of freedom


def train(output: Path, *overrides: str) -> None:
    """Run a stage of the demo with the command line."""
    settings = ["checkpoint.every_steps=0", *overrides, f"output={output}"]
    run("-m", "megatron_sr1", "train", "examples/digits_cpu.yaml", *settings)


def run_seed(directory: Path, seed: int, more: list[str]) -> dict[str, Path]:
    """Train what a seed still lacks; return credit -> run directory."""
    prepare(directory, seed)
    data, cold = directory / "data", directory / "cold_start"
    if not (cold / "hf" / "config.json").is_file():
        own = [f"model.path={directory / 'model'}", f"data.train={data / 'cold_start'}"]
        train(cold, *COLD_START, *own, "evaluation.sets=", f"seed={seed}")
    runs = {credit: directory / credit for credit in CREDITS}
    for credit, target in runs.items():
        if not (target / "report.html").is_file():  # the last file that a run writes
            own = [f"model.path={cold / 'hf'}", f"data.train={data / 'train'}"]
            own += [f"evaluation.sets.{way}.path={data / 'eval'}" for way in WAYS]
            own += ["evaluation.max_samples=0", f"seed={seed}"]
            train(target, *own, f"algorithm.credit={credit}", *more)
    return runs


def tables(found: dict[int, dict[str, Path]], way: str) -> str:
    """Return rates by seed and credit, and their differences, as a table."""
    rows, differences = [], {}
    for seed, runs in found.items():
        lines = {credit: read_lines(run / "eval" / f"{way}.jsonl") for credit, run in runs.items()}
        for credit in CREDITS:
            means = [rate(lines[credit], verdict) for verdict in VERDICTS]
            rows.append([str(seed), credit, *(f"{mean:.3f}" for mean in means)])
        differences[seed] = [paired(lines["scalar"], lines["span"], v) for v in VERDICTS]
    for seed, gaps in differences.items():
        cells = [f"{mean:+.3f} ± {half:.3f}" for mean, half in gaps]
        rows.append([str(seed), "span - scalar", *cells])
    if len(found) - 1 in T95:
        cells = []
        for column in range(len(VERDICTS)):
            means = [gaps[column][0] for gaps in differences.values()]
            half = T95[len(means) - 1] * statistics.stdev(means) / math.sqrt(len(means))
            cells.append(f"{statistics.mean(means):+.3f} ± {half:.3f}")
        rows.append(["all", "span - scalar", *cells])
    return table([f"seed, {way}", "credit", *LABELS], rows)


def main() -> None:
    """Train what is missing and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "credit")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of both GRPO runs")
    arguments = parser.parse_args()
    output = arguments.output.resolve()
    found = {
        seed: run_seed(output / f"seed_{seed}", seed, arguments.overrides)
        for seed in arguments.seeds
    }
    for way in ("sampled", "greedy"):
        print(tables(found, way))


if __name__ == "__main__":
    main()
