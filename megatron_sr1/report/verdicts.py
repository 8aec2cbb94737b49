"""Rates of verdicts: bars, tables, paired differences, and the table of answers x readings.

In: lines of evaluation files. Out: HTML of one table or figure each, "" if the lines hold no data
for it.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from megatron_sr1.report import page
from megatron_sr1.report.figures import Bar, bar_chart
from megatron_sr1.rewards import score
from megatron_sr1.rewards.score import VERDICTS, rate

Lines = list[dict[str, Any]]
LABELS = [label for _, label in VERDICTS.values()]


def with_interval(lines: Lines, verdict: str) -> Bar | None:
    """Return the rate of a verdict over the lines that have it, and half its 95 % interval."""
    share, number = rate(lines, verdict), sum(line.get(verdict) is not None for line in lines)
    if share is None:
        return None
    return share, 1.96 * math.sqrt(share * (1 - share) / number)


def paired(first: Lines, second: Lines, verdict: str) -> Bar | None:
    """Return the mean of second minus first, and half the width of its 95 % interval.

    The mean is over the questions for which both evaluations have the verdict, each with the mean
    of its responses; None with fewer than two.
    """
    before, after = (_by_question(lines, verdict) for lines in (first, second))
    gaps = [value - before[index] for index, value in after.items() if index in before]
    if len(gaps) < 2:
        return None
    return statistics.fmean(gaps), 1.96 * statistics.stdev(gaps) / math.sqrt(len(gaps))


def _by_question(lines: Lines, verdict: str) -> dict[int, float]:
    found = defaultdict(list)
    for line in lines:
        if line.get(verdict) is not None:
            found[line["index"]].append(line[verdict])
    return {index: statistics.fmean(values) for index, values in found.items()}


def verdict_bars(judged: Mapping[str, Lines], way: str = "", first_colour: int = 1) -> str:
    """Draw a bar chart of the verdicts' rates, by the name of a model.

    `way` says in the title how the models answered; the first model may be grey (colour 0).
    """
    bars = {name: [with_interval(lines, v) for v in VERDICTS] for name, lines in judged.items()}
    title = f"Held-out questions{', ' if way else ''}{way}"
    return bar_chart(title, *_of_any(bars), "share of responses", first_colour=first_colour)


def difference_bars(title: str, gaps: Mapping[str, Sequence[Bar | None]]) -> str:
    """Draw paired differences of all verdicts in points, with their 95 % intervals, by name."""
    points = {
        name: [None if gap is None else (100 * gap[0], 100 * gap[1]) for gap in row]
        for name, row in gaps.items()
    }
    return bar_chart(title, *_of_any(points), "difference, points", percent=False)


def _of_any(
    bars: Mapping[str, Sequence[Bar | None]],
) -> tuple[list[str], dict[str, list[Bar | None]]]:
    """Leave out the verdicts that nothing has; return labels and bars."""
    kept = [i for i in range(len(LABELS)) if any(row[i] for row in bars.values())]
    return [LABELS[i] for i in kept], {name: [row[i] for i in kept] for name, row in bars.items()}


def verdict_table(title: str, judged: Mapping[str, Lines]) -> str:
    """Return a table of the verdicts' rates, %, with 95 % intervals, by the name of a model."""
    rows = [
        [name, *(in_points(with_interval(lines, verdict)) for verdict in VERDICTS)]
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
                cells = (in_points(gap, sign="+") for gap in gaps)
                rows.append([f"{way}: {other} minus {one}", *cells])
    return page.table(["difference, points", *LABELS], rows)


def in_points(bar: Bar | None, sign: str = "") -> str:
    """Return a rate or difference with its interval in points; with sign "+", always signed."""
    if bar is None:
        return "–"
    return f"{100 * bar[0]:{sign}.1f}\u00a0±\u00a0{100 * bar[1]:.1f}"  # a cell stays on one line


def cross(title: str, lines: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of answers x readings for the lines that have both, with shares and counts.

    The shortcut (right with the image, wrong from the description) is framed.
    """
    cells = score.cross((line["accuracy"], line["self_reward"]) for line in lines)
    total = cells.total()
    if not total:
        return ""
    rows = "<tr><th></th><th>reading right</th><th>reading wrong</th></tr>"
    for first, word in ((True, "right"), (False, "wrong")):
        rows += f"<tr><th>answer {word}</th>"
        for second in (True, False):
            share, kind = cells[first, second] / total, ' class="shortcut"' * (first > second)
            tint = f'style="background:rgba(var(--tint),{0.04 + 0.4 * share:.3f})"'
            rows += f"<td{kind} {tint}>{share:.1%}<small>{cells[first, second]}</small></td>"
        rows += "</tr>"
    shortcuts = cells[True, False] / total
    return (
        f'<div class="card"><h3>{escape(title)}</h3><table class="cross">{rows}</table>'
        f'<p class="note" style="margin:10px 0 0">shortcut rate {shortcuts:.1%} of {total}</p>'
        "</div>"
    )
