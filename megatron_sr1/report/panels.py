"""Tables and charts of the report, computed from lines of metrics and evaluation files.

In: lines as read. Out: HTML of one table or chart each, "" if the lines hold no data for it.
"""

from __future__ import annotations

import itertools
import math
import re
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from megatron_sr1.report import page
from megatron_sr1.report.charts import Bar, Series, bar_chart, line_chart, stacked_chart
from megatron_sr1.rewards import score
from megatron_sr1.rewards.score import VERDICTS, rate

Lines = list[dict[str, Any]]
LABELS = [label for _, label in VERDICTS.values()]
CURVES = {
    "Rewards": {"accuracy": "answer", "self_reward": "self-reward", "format": "form"},
    "Shortcuts and leaks": {"shortcut_rate": "shortcut", "leak_rate": "leak"},
}
"""Charts of several `reward/` metrics, which are shares: title -> name -> legend."""
TITLES = {
    "reward/total": "Reward",
    "reward/accuracy": "Answer right",
    "reward/self_reward": "Self-reward",
    "reward/format": "Form",
    "reward/shortcut_rate": "Language-shortcut rate",
    "actor/loss": "Loss",
    "actor/reference_kl": "KL to the reference",
    "mismatch/abs_max": "Engine against trainer, largest difference, nats",
    "optimizer/grad_norm": "Gradient norm",
    "rollout/response_tokens": "Response tokens per step",
}
NUM_COLOURS = 7
"""Colours of curves, from 1; further curves have them again."""
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
"""Throughput charts, a line per phase: ending of the names in `perf/` -> title."""
SHARES = ("reward/accuracy", "reward/self_reward", "reward/format", "reward/shortcut_rate")


def _bar(lines: Lines, verdict: str) -> Bar | None:
    share = rate(lines, verdict)
    if share is None:
        return None
    return share, 1.96 * math.sqrt(share * (1 - share) / len(lines))


def paired(first: Lines, second: Lines, verdict: str) -> Bar | None:
    """Return the mean of second minus first, and half the width of its 95 % interval.

    The mean is over the questions for which both evaluations have the verdict; None with fewer than
    two.
    """
    before = {line["index"]: line.get(verdict) for line in first}
    pairs = [(before.get(line["index"]), line.get(verdict)) for line in second]
    gaps = [b - a for a, b in pairs if a is not None and b is not None]
    if len(gaps) < 2:
        return None
    return statistics.fmean(gaps), 1.96 * statistics.stdev(gaps) / math.sqrt(len(gaps))


def verdict_bars(judged: Mapping[str, Lines], way: str = "") -> str:
    """Draw a bar chart of the verdicts' rates, by the name of a model.

    `way` says in the title how the models answered.
    """
    bars = {name: [_bar(lines, v) for v in VERDICTS] for name, lines in judged.items()}
    title = f"Share of held-out questions, %{', ' if way else ''}{way}"
    return bar_chart(title, LABELS, bars) if bars else ""


def verdict_table(title: str, judged: Mapping[str, Lines]) -> str:
    """Return a table of the verdicts' rates, %, with 95 % intervals, by the name of a model."""
    rows = [
        [name, *(_percent(_bar(lines, verdict)) for verdict in VERDICTS)]
        for name, lines in judged.items()
        if lines
    ]
    return page.table([title, *LABELS], rows)


def difference_table(judged: Mapping[str, Mapping[str, Lines]]) -> str:
    """Return a table of paired differences between all models, points, with 95 % intervals.

    `judged` maps how the models answered to their evaluation lines by name.
    """
    rows = []
    for way, models in judged.items():
        for (one, first), (other, second) in itertools.combinations(models.items(), 2):
            gaps = [paired(first, second, verdict) for verdict in VERDICTS]
            if any(gaps):
                cells = (_percent(gap, sign="+") for gap in gaps)
                rows.append([f"{way}: {other} minus {one}", *cells])
    return page.table(["difference, points", *LABELS], rows)


def _percent(bar: Bar | None, sign: str = "") -> str:
    if bar is None:
        return "–"
    return f"{100 * bar[0]:{sign}.1f}\u00a0±\u00a0{100 * bar[1]:.1f}"  # a cell stays on one line


def cross(title: str, lines: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of pass 1 x pass 2 for the lines that have both, with shares and counts.

    The shortcut (right with the image, wrong without) is framed.
    """
    cells = score.cross((line["accuracy"], line["self_reward"]) for line in lines)
    total = cells.total()
    if not total:
        return ""
    rows = "<tr><th></th><th>pass 2 right</th><th>pass 2 wrong</th></tr>"
    for first, word in ((True, "right"), (False, "wrong")):
        rows += f"<tr><th>pass 1 {word}</th>"
        for second in (True, False):
            share, kind = cells[first, second] / total, ' class="shortcut"' * (first > second)
            tint = f'style="background:rgba(var(--mark),{0.04 + 0.4 * share:.3f})"'
            rows += f"<td{kind} {tint}>{share:.1%}<small>{cells[first, second]}</small></td>"
        rows += "</tr>"
    rate = cells[True, False] / total
    return (
        f'<div class="card"><h3>{escape(title)}</h3><table class="cross">{rows}</table>'
        f'<p class="note" style="margin:10px 0 0">language-shortcut rate {rate:.1%} of {total}</p>'
        "</div>"
    )


def _series(lines: Lines, metric: str, name: str, colour: int) -> Series:
    steps = [line["step"] for line in lines]
    return Series(name, steps, [line.get(metric) for line in lines], colour)


def overlay(metric: str, runs: Mapping[str, Lines]) -> str:
    """Draw one metric of several runs in one chart."""
    series = [_series(lines, metric, name, i + 1) for i, (name, lines) in enumerate(runs.items())]
    return line_chart(TITLES[metric], series, percent=metric in SHARES)


def run_charts(lines: Lines) -> list[str]:
    """Draw the known charts, then one for each remaining metric."""
    charts, seen = [], {"step", "stage"}
    for title, legends in CURVES.items():
        named = {f"reward/{name}": legend for name, legend in legends.items()}
        charts.append(_curves(title, lines, named, percent=True))
        seen |= set(named)
    rest = {name for line in lines for name in line} - seen
    by_set = sorted(n for n in rest if re.fullmatch("reward/.+/.+", n))
    for metric in dict.fromkeys(name.rpartition("/")[0] for name in by_set):
        named = {n: n.rpartition("/")[2] for n in by_set if n.startswith(f"{metric}/")}
        charts.append(_curves(f"{TITLES[metric]}, by training set", lines, named, percent=True))
    rest -= set(by_set)
    for ending, title in RATES.items():
        found = sorted(n for n in rest if n.startswith("perf/") and n.endswith(ending))
        named = {n: n.removeprefix("perf/").removesuffix(f"_{ending}") for n in found}
        charts.append(_curves(title, lines, named, percent=ending == "mfu"))
    charts += _evaluation_charts(lines, sorted(n for n in rest if n.startswith("evaluation/")))
    for name in [*(n for n in TITLES if n in rest), *sorted(rest - set(TITLES))]:
        if not name.startswith(("time/", "table/", "perf/", "evaluation/")):
            charts.append(line_chart(TITLES.get(name, name), [_series(lines, name, name, 2)]))
    return [chart for chart in charts if chart]


def _evaluation_charts(lines: Lines, names: list[str]) -> list[str]:
    """Draw a chart per rate of the evaluations during training, with a line per held-out set."""
    charts = []
    for rate_name in dict.fromkeys(name.rpartition("/")[2] for name in names):
        named = {n: n.split("/")[1] for n in names if n.endswith(f"/{rate_name}")}
        evaluated = [line for line in lines if line.keys() & named]
        if rate_name not in ("questions", "ungraded", "skipped", "judged", "unjudged"):
            percent = rate_name not in ("loss", "judge_kappa")
            charts.append(_curves(f"Held out: {rate_name}", evaluated, named, percent))
    return charts


def _curves(title: str, lines: Lines, named: Mapping[str, str], percent: bool) -> str:
    """Draw several metrics of a run; `named` maps each to its legend."""
    series = [_series(lines, *pair, 1 + i % NUM_COLOURS) for i, pair in enumerate(named.items())]
    return line_chart(title, series, percent)


def _phases(lines: Lines) -> list[str]:
    """Return the phases, longest first, without the step as a whole."""
    sums: Counter[str] = Counter()
    for line in lines:
        sums.update({name: v for name, v in line.items() if name.startswith("time/") and v})
    del sums["time/step_seconds"]
    return [name for name, _ in sums.most_common()]


def _phase_name(metric: str) -> str:
    return metric.removeprefix("time/").removesuffix("_seconds").replace("_", " ")


def time_chart(title: str, lines: Lines) -> str:
    """Draw the seconds per step by phase; phases without their own colour are summed."""
    layers = [_series(lines, name, _phase_name(name), c) for name, c in PHASE_COLOURS.items()]
    others = [name for name in _phases(lines) if name not in PHASE_COLOURS]
    rest = [sum(line.get(name) or 0.0 for name in others) for line in lines]
    steps = [line["step"] for line in lines]
    return stacked_chart(title, [*layers, Series("others", steps, rest, 0)])


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
