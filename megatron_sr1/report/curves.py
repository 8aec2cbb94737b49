"""Figures of metrics over steps, of one run or of several on the same axes.

In: lines of metrics.jsonl. Out: HTML of one figure or table each, "" if the lines hold no data.
`FIGURES` are those that matter; the others are drawn under their metrics' names. A metric that does
not change is not drawn as a curve but listed with its value.
"""

from __future__ import annotations

import math
import re
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from megatron_sr1.report import figures, page
from megatron_sr1.report.figures import DASHES, Curve

Lines = list[dict[str, Any]]
MEAN_LENGTH, NUM_TOKENS = "rollout/response_tokens_mean", "rollout/response_tokens"
TOKENS, NATS = "tokens", "nats per token"


@dataclass(frozen=True)
class Plot:
    """A figure of some metrics, whose names map to their legends; `percent` for shares."""

    title: str
    y_title: str
    metrics: Mapping[str, str]
    percent: bool = False


def _share(title: str, **metrics: str) -> Plot:
    return Plot(title, "share of responses", {f"reward/{n}": v for n, v in metrics.items()}, True)


LENGTHS = {"_mean": "mean", "_p95": "95th percentile", "_max": "longest"}
FIGURES = (
    Plot("Reward", "reward", {"reward/total": "reward"}),
    _share("Answer right", accuracy="answer"),
    _share("Self-reward", self_reward="self-reward"),
    _share("Form right", format="form"),
    _share("Shortcuts and leaks", shortcut_rate="shortcut rate", leak_rate="leak rate"),
    Plot("KL to the reference", NATS, {"actor/reference_kl": "KL"}),
    Plot("Entropy", NATS, {"actor/entropy": "entropy"}),
    Plot("Response length", TOKENS, {f"{NUM_TOKENS}{n}": v for n, v in LENGTHS.items()}),
    Plot("Learning rate", "learning rate", {"optimizer/learning_rate": "learning rate"}),
    Plot("Loss", "loss", {"actor/loss": "loss"}),
    Plot("Gradient norm", "norm", {"optimizer/grad_norm": "gradient norm"}),
    Plot("Prompts without a gradient", "share of prompts", {"groups/no_spread": "share"}, True),
    Plot(
        "Truncated and repetitive responses",
        "share",
        {"rollout/truncated_share": "truncated", "rollout/repetition": "repeated 4-grams"},
        True,
    ),
    Plot("Engine against trainer, largest difference", "nats", {"mismatch/abs_max": "largest"}),
    Plot("Duration of a step", "seconds", {"time/step_seconds": "duration"}),
)
"""Figures of a run that matter, in the page's order, after those of its evaluations."""
HELD_OUT = {
    "accuracy": "answer right",
    "self_reward": "self-reward",
    "shortcut_rate": "shortcut rate",
    "loss": "loss",
}
"""Rates of evaluations that have a figure among those that matter."""
NOT_RATES = ("questions", "ungraded", "skipped", "judged", "unjudged")
"""Names of an evaluation that have no figure."""
NUM_FIGURES = 15
"""Figures that a run's page shows; the others are folded away."""
PHASE_COLOURS = {
    "time/pass1_seconds": 2,
    "time/pass2_seconds": 1,
    "time/reward_seconds": 4,
    "time/old_logprobs_seconds": 7,
    "time/reference_seconds": 6,
    "time/update_seconds": 3,
    "time/sync_seconds": 5,
}
"""Phases with their own layer, from the bottom up."""
RATES = {
    "tokens_per_second": "Tokens per second",
    "tflops_per_rank": "TFLOP/s per rank",
    "mfu": "MFU",
}
"""Throughput figures, a curve per phase: ending of the names in `perf/` -> title."""
CELLS = {
    "pass1_right_pass2_right": ("both right", 3),
    "pass1_right_pass2_wrong": ("shortcut", 1),
    "pass1_wrong_pass2_right": ("only the reading right", 5),
    "pass1_wrong_pass2_wrong": ("both wrong", 0),
}
"""Cells of answers x readings in `table/` -> label, colour."""


def with_mean_length(lines: Lines, config: Mapping[str, Any]) -> Lines:
    """Add the mean length of a response where older runs have the sum over a step only."""
    of_step = config.get("data", {}).get("prompts_per_step", 0)
    of_step *= config.get("rollout", {}).get("samples_per_prompt", 0)
    if not of_step:
        return lines
    return [
        {MEAN_LENGTH: line[NUM_TOKENS] / of_step, **line} if NUM_TOKENS in line else line
        for line in lines
    ]


def curve(
    lines: Lines, metric: str, name: str, colour: int | None = None, dash: str = "solid"
) -> Curve:
    """Return a metric of a run as a curve."""
    steps = [line["step"] for line in lines]
    return Curve(name, steps, [line.get(metric) for line in lines], colour, dash)


def training_overlays(runs: Mapping[str, Lines]) -> list[str]:
    """Draw the figures that matter of the training steps, each with the curves of several runs."""
    drawn = []
    for plot in FIGURES:
        for metric, legend in plot.metrics.items():
            title = plot.title if len(plot.metrics) == 1 else f"{plot.title}: {legend}"
            having = [name for name, lines in runs.items() if any(metric in each for each in lines)]
            if len(having) == 1 and len(runs) > 1:
                title += f", {having[0]} alone"
            curves = [curve(lines, metric, name) for name, lines in runs.items()]
            drawn.append(figures.line_chart(title, curves, plot.y_title, plot.percent))
    return [figure for figure in drawn if figure]


def held_out_figures(runs: Mapping[str, Lines], others: bool = False) -> list[str]:
    """Draw a figure per rate of the evaluations during training, a curve per run and set.

    Of several runs, each has a colour and each set a style of line. With `others`, those that are
    not in HELD_OUT.
    """
    names = {name for lines in runs.values() for line in lines for name in line}
    found = sorted(name for name in names if name.startswith("evaluation/"))
    rates = dict.fromkeys(name.rpartition("/")[2] for name in found)
    rest = [name for name in rates if name not in (*HELD_OUT, *NOT_RATES)]
    drawn = []
    for rate in rest if others else [name for name in HELD_OUT if name in rates]:
        of_rate = [name for name in found if name.endswith(f"/{rate}")]
        curves = []
        for (place, (name, lines)), metric in product(enumerate(runs.items(), 1), of_rate):
            each = of_rate.index(metric)
            legend = ", ".join(filter(None, (name, metric.split("/")[1])))
            evaluated = [line for line in lines if metric in line]
            looks = (place, DASHES[each % len(DASHES)]) if len(runs) > 1 else (None, "solid")
            curves.append(curve(evaluated, metric, legend, *looks))
        percent = rate not in ("loss", "judge_kappa") and "tokens" not in rate
        title = f"Held out: {HELD_OUT.get(rate, rate)}"
        y_title = "share of questions" if percent else rate
        drawn.append(figures.line_chart(title, curves, y_title, percent))
    return [figure for figure in drawn if figure]


def run_figures(lines: Lines) -> tuple[list[str], list[str]]:
    """Draw all metrics of a run: the figures that matter, and the others."""
    matter = held_out_figures({"": lines})
    for plot in FIGURES:
        curves = [curve(lines, *pair) for pair in plot.metrics.items()]
        matter.append(figures.line_chart(plot.title, curves, plot.y_title, plot.percent))
    matter = [figure for figure in matter if figure]
    others = [cell_figure(lines), *held_out_figures({"": lines}, others=True), *_others(lines)]
    return matter[:NUM_FIGURES], [figure for figure in (*matter[NUM_FIGURES:], *others) if figure]


def cell_figure(lines: Lines, title: str = "Answers x readings") -> str:
    """Draw the shares of the four cells of answers x readings over the steps."""
    found = [line for line in lines if all(f"table/{name}" in line for name in CELLS)]
    curves = [curve(found, f"table/{name}", *shown) for name, shown in CELLS.items()]
    return figures.stacked_area(title, curves, "share of responses")


def _others(lines: Lines) -> list[str]:
    """Draw what is not in FIGURES: metrics of each training set, throughput, and single ones."""
    drawn = []
    known = {metric for plot in FIGURES for metric in plot.metrics} | {"step", "stage"}
    rest = {name for line in lines for name in line} - known
    by_set = sorted(n for n in rest if re.fullmatch("reward/.+/.+", n))
    for metric in dict.fromkeys(name.rpartition("/")[0] for name in by_set):
        named = {n: n.rpartition("/")[2] for n in by_set if n.startswith(f"{metric}/")}
        title = next((p.title for p in FIGURES if metric in p.metrics), metric)
        drawn.append(_curves(f"{title}, by training set", lines, named, percent=True))
    for ending, title in RATES.items():
        found = sorted(n for n in rest if n.startswith("perf/") and n.endswith(ending))
        named = {n: n.removeprefix("perf/").removesuffix(f"_{ending}") for n in found}
        drawn.append(_curves(title, lines, named, percent=ending == "mfu"))
    single = rest - set(by_set)
    for name in sorted(single):
        if not name.startswith(("time/", "table/", "perf/", "evaluation/")):
            drawn.append(_curves(name, lines, {name: name}))
    return drawn


def _curves(title: str, lines: Lines, named: Mapping[str, str], percent: bool = False) -> str:
    """Draw several metrics of a run; `named` maps each to its legend."""
    curves = [curve(lines, *pair) for pair in named.items()]
    return figures.line_chart(title, curves, percent=percent)


def constant_table(lines: Lines) -> str:
    """Return a table of the metrics that do not change over the steps."""
    rows = []
    for name in sorted({name for line in lines for name in line} - {"step", "stage"}):
        found = curve(lines, name, name)
        values = [v for v in found.ys if v is not None]
        if found.is_constant() and values and math.isfinite(values[0]):
            rows.append([name, figures.shown(values[0]), str(len(values))])
    return page.table(["constant metric", "value", "steps"], rows)


def _phases(lines: Lines) -> list[str]:
    """Return the phases, longest first, without the step as a whole."""
    sums: Counter[str] = Counter()
    for line in lines:
        sums.update({name: v for name, v in line.items() if name.startswith("time/") and v})
    del sums["time/step_seconds"]
    return [name for name, _ in sums.most_common()]


def _phase_name(metric: str) -> str:
    return metric.removeprefix("time/").removesuffix("_seconds").replace("_", " ")


def time_figure(title: str, lines: Lines) -> str:
    """Draw the seconds per step by phase; phases without their own colour are summed."""
    layers = [curve(lines, name, _phase_name(name), c) for name, c in PHASE_COLOURS.items()]
    others = [name for name in _phases(lines) if name not in PHASE_COLOURS]
    rest = [sum(line.get(name) or 0.0 for name in others) for line in lines]
    steps = [line["step"] for line in lines]
    return figures.stacked_bars(title, [*layers, Curve("others", steps, rest, 0)], "seconds")


def time_table(runs: Mapping[str, Lines]) -> str:
    """Return a table of the median seconds of each phase; `runs`: column name -> its lines."""
    rows = []
    names = list(dict.fromkeys(name for lines in runs.values() for name in _phases(lines)))
    for name in [*names, "time/step_seconds"]:
        columns = [[line[name] for line in lines if line.get(name)] for lines in runs.values()]
        cells = [f"{statistics.median(column):.3g}" if column else "–" for column in columns]
        if any(columns):
            rows.append([_phase_name(name), *cells])
    return page.table(["median seconds", *runs], rows) if names else ""


def last_means(lines: Lines, names: Sequence[str]) -> dict[str, float]:
    """Return the means of some metrics over the last tenth of the steps, where they exist."""
    tail = lines[-max(len(lines) // 10, 1) :]
    found = {name: [line[name] for line in tail if line.get(name) is not None] for name in names}
    return {name: statistics.fmean(values) for name, values in found.items() if values}
