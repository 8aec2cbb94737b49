"""Figures of a page: curves, stacked layers and bars as data for Plotly's script.

In: named values. Out: HTML of one figure each, with its data as JSON, which `script.py` draws; ""
if there is nothing to draw. Colours are names of CSS variables: a page is light or dark.
Names are escaped: Plotly reads some tags in texts, links among them.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

MAX_POINTS = 400
"""Points of a curve; a longer one is averaged."""
NUM_COLOURS = 7
"""Colours of curves, from 1; further curves have them again. 0 is grey."""
DASHES = ("solid", "dash", "dot", "dashdot")
LEGEND_ROW_PIXELS = 19
FLAT = 1e-10
"""Values that differ by less are constant."""
Bar = tuple[float, float]
"""Value, and half the width of its 95 % interval; 0 draws none."""
Trace = dict[str, Any]


@dataclass(frozen=True)
class Curve:
    """Values `ys` (None for a missing one) over the steps `xs`, ascending.

    The name is shown in the legend. `colour` counts from 1, 0 is grey, None is that of its place;
    `dash` is a style of lines in DASHES.
    """

    name: str
    xs: Sequence[float]
    ys: Sequence[float | None]
    colour: int | None = None
    dash: str = "solid"

    def points(self) -> tuple[list[float], list[float]]:
        """Return steps and values without those that are missing or not finite."""
        pairs = zip(self.xs, self.ys, strict=True)
        found = [(x, y) for x, y in pairs if y is not None and math.isfinite(y)]
        return [x for x, _ in found], [y for _, y in found]

    def is_constant(self) -> bool:
        """Return True if all values are the same, or there is at most one."""
        ys = self.points()[1]
        return not ys or max(ys) - min(ys) <= FLAT


def line_chart(
    title: str, curves: Sequence[Curve], y_title: str = "", percent: bool = False
) -> str:
    """Draw curves over steps, each on the common axis of their values.

    The page adds a moving average to a long curve and shows its values in pale. A constant curve is
    not drawn: the caption gives its value. With `percent`, values are shares. Return "" if no curve
    varies.
    """
    traces, constants = [], []
    for place, curve in enumerate(curves):
        xs, ys = curve.points()
        if curve.is_constant():
            constants += [f"{curve.name} {shown(ys[0], percent)}"] if ys else []
            continue
        traces.append(_trace(curve, place, *_thinned(xs, ys), percent))
        traces[-1]["mode"] = "lines+markers" if len(xs) <= 20 else "lines"
    note = f"constant: {', '.join(constants)}" if constants and traces else ""
    return _figure(title, traces, _axes(y_title, percent), note)


def stacked_area(title: str, curves: Sequence[Curve], y_title: str) -> str:
    """Draw shares that add up to 1, stacked from the bottom up."""
    if all(curve.is_constant() for curve in curves):
        return ""
    traces = []
    for place, curve in enumerate(curves):
        trace = _trace(curve, place, *_thinned(*curve.points()), True)
        line = {**trace["line"], "width": 0.5}
        traces.append(trace | {"mode": "lines", "line": line, "stackgroup": "all"})
    axes = _axes(y_title, True)
    axes["yaxis"]["range"] = [0, 1]
    return _figure(title, traces, axes)


def stacked_bars(title: str, curves: Sequence[Curve], y_title: str) -> str:
    """Draw layers stacked from the bottom up, such as the seconds of a step's phases.

    All layers have the same steps; a missing value counts as 0.
    """
    traces = []
    for place, curve in enumerate(curves):
        if any(curve.ys):
            found = [y if y is not None and math.isfinite(y) else 0.0 for y in curve.ys]
            xs, ys = _thinned(curve.xs, found)
            trace = _trace(curve, place, xs, ys, False)
            trace["marker"] = {"color": trace.pop("line")["color"]}
            traces.append(trace | {"type": "bar"})
    return _figure(title, traces, _axes(y_title, False) | {"barmode": "stack", "bargap": 0.1})


def bar_chart(
    title: str,
    labels: Sequence[str],
    bars: Mapping[str, Sequence[Bar | None]],
    x_title: str,
    percent: bool = True,
    first_colour: int = 1,
) -> str:
    """Draw horizontal bars with 95 % intervals: a group per label, in each a bar per name.

    `bars` maps a name to a bar per label, None where there is none. With `percent`, values are
    shares. Names have colours from the first on; 0 is grey.
    """
    traces: list[Trace] = []
    rows = [escape(label) for label in labels]
    for number, (name, row) in enumerate(bars.items(), first_colour):
        found = [(label, *bar) for label, bar in zip(rows, row, strict=True) if bar is not None]
        if not found:
            continue
        trace: Trace = {
            "type": "bar",
            "orientation": "h",
            "name": escape(name),
            "y": [label for label, _, _ in found],
            "x": [_rounded(value) for _, value, _ in found],
            "marker": {"color": _colour(number)},
        }
        if any(half for _, _, half in found):
            halves = [_rounded(half) for _, _, half in found]
            trace["error_x"] = {"type": "data", "array": halves, "color": "--ink", "width": 3}
            trace["error_x"]["thickness"] = 1.2
        traces.append(trace)
    form = {"tickformat": ".3~p", "hoverformat": ".1%"} if percent else {"hoverformat": "+.1f"}
    labels_axis = {"autorange": "reversed", "automargin": True, "categoryarray": rows}
    layout = {
        "xaxis": {"title": {"text": escape(x_title)}, **form},
        "yaxis": labels_axis | {"categoryorder": "array"},
        "barmode": "group",
        "hovermode": "closest",
    }
    height = 100 + len(rows) * (16 + 16 * len(traces))
    return _figure(title, traces, layout, height=height)


def shown(value: float, percent: bool = False) -> str:
    """Return a value as text, with few digits."""
    return f"{100 * value:.4g} %" if percent else f"{value:.5g}"


def _trace(
    curve: Curve, place: int, xs: Sequence[float], ys: Sequence[float], percent: bool
) -> Trace:
    """Return the trace of a curve; steps that are evenly spaced take two numbers."""
    colour = place + 1 if curve.colour is None else curve.colour
    trace: Trace = {"type": "scatter", "name": escape(curve.name)}
    trace["line"] = {"color": _colour(colour), "dash": curve.dash}
    trace["y"] = [_rounded(y) for y in ys]
    gaps = {b - a for a, b in zip(xs, xs[1:], strict=False)}
    even = {"x0": xs[0], "dx": gaps.pop()} if len(gaps) == 1 else {"x": list(xs)}
    return trace | even | {"yhoverformat": ".2%" if percent else ".5~g"}


def _thinned(xs: Sequence[float], ys: Sequence[float]) -> tuple[list[float], list[float]]:
    """Average neighbours until at most MAX_POINTS are left; each has the last of its steps."""
    size = math.ceil(len(xs) / MAX_POINTS) or 1
    groups = [slice(start, start + size) for start in range(0, len(xs), size)]
    return [xs[group][-1] for group in groups], [statistics.fmean(ys[group]) for group in groups]


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")


def _colour(number: int) -> str:
    return f"--c{1 + (number - 1) % NUM_COLOURS if number else 0}"


def _axes(y_title: str, percent: bool) -> dict[str, Any]:
    form = {"tickformat": ".3~p"} if percent else {"exponentformat": "power"}
    y_axis = {"title": {"text": escape(y_title)}, "automargin": True, **form}
    return {"xaxis": {"title": {"text": "step"}, "zeroline": False}, "yaxis": y_axis}


def _figure(
    title: str,
    traces: Sequence[Trace],
    layout: Mapping[str, Any],
    note: str = "",
    height: int = 260,
) -> str:
    if not traces:
        return ""
    more = f' <span class="soft">{escape(note)}</span>' if note else ""
    height += LEGEND_ROW_PIXELS * max(len(traces) - 2, 0)
    data = script_json({"data": traces, "layout": layout})
    return (
        f"<figure><figcaption><b>{escape(title)}</b>{more}</figcaption>"
        f'<div class="chart" role="img" aria-label="{escape(title)}" style="height:{height}px">'
        f'</div><script type="application/json">{data}</script></figure>'
    )


def script_json(value: Any) -> str:
    """Return JSON for a <script> element, which no text in it can end or change."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text
