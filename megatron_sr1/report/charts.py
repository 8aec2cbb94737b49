"""Charts as inline SVG, without scripts; the page's style sheet colours them, light and dark.

Points and bars have their values as tooltips.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape

WIDTH, HEIGHT = 520, 250
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 12, 30
MAX_POINTS = 400
MAX_TOOLTIPS = 120
FLAT = 1e-10
"""Values that differ by less are drawn as equal."""
Bar = tuple[float, float]
"""Height of a bar and half the width of its 95 % interval; 0 draws none."""


@dataclass(frozen=True)
class Series:
    """Values `ys` (None for a missing one) over the steps `xs`, ascending.

    The name is shown in the legend; the colour is an index into the page's palette, 0 to 7.
    """

    name: str
    xs: Sequence[float]
    ys: Sequence[float | None]
    colour: int

    def thinned(self) -> tuple[list[float], list[float]]:
        """Return steps and values without missing ones, averaged to at most MAX_POINTS points."""
        pairs = [(x, y) for x, y in zip(self.xs, self.ys, strict=True) if y is not None]
        size = math.ceil(len(pairs) / MAX_POINTS) or 1
        cells = [pairs[i : i + size] for i in range(0, len(pairs), size)]
        return [cell[-1][0] for cell in cells], [sum(y for _, y in c) / len(c) for c in cells]


class _Frame:
    """Axes: the mapping from data to pixels, ticks and grid lines."""

    def __init__(self, xs: tuple[float, float], ys: tuple[float, float]) -> None:
        self.x0, self.x1 = xs if xs[0] < xs[1] else (xs[0] - 0.5, xs[0] + 0.5)
        # Differences due to rounding are drawn as a flat line.
        self.y_ticks = _ticks(*(ys if ys[1] - ys[0] > FLAT else (ys[0] - 0.5, ys[0] + 0.5)))
        self.y0, self.y1 = self.y_ticks[0], self.y_ticks[-1]

    def x(self, value: float) -> float:
        return LEFT + (value - self.x0) / (self.x1 - self.x0) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.y0) / (self.y1 - self.y0) * (HEIGHT - TOP - BOTTOM)

    def grid(self, percent: bool, x_ticks: bool = True) -> list[str]:
        parts = []
        for tick in self.y_ticks:
            y = self.y(tick)
            ends = f'x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"'
            parts.append(f'<line class="grid" {ends}/>')
            label = f"{tick * 100:.3g}%" if percent else _number(tick)
            parts.append(_text("tick", LEFT - 7, y + 4, label, "end"))
        for tick in _ticks(self.x0, self.x1, whole=True) if x_ticks else ():
            if self.x0 <= tick <= self.x1:
                parts.append(_text("tick", self.x(tick), HEIGHT - 10, _number(tick)))
        return parts

    def path(self, xs: Sequence[float], ys: Sequence[float]) -> str:
        points = zip(xs, ys, strict=True)
        return "M" + "L".join(f"{self.x(x):.1f} {self.y(y):.1f}" for x, y in points)


def _text(kind: str, x: float, y: float, label: str, anchor: str = "middle") -> str:
    where = f'x="{round(x, 1)}" y="{round(y, 1)}" text-anchor="{anchor}"'
    return f'<text class="{kind}" {where}>{escape(label)}</text>'


def _rect(
    colour: int, x: float, y: tuple[float, float], width: float, tip: str, corners: str = ""
) -> str:
    """Return a rectangle with a tooltip; `y` holds its top and its bottom, pixels."""
    box = f'x="{x:.1f}" y="{y[0]:.1f}" width="{width:.1f}" height="{y[1] - y[0]:.1f}"{corners}'
    return f'<rect class="f{colour}" {box}><title>{escape(tip)}</title></rect>'


def _number(value: float) -> str:
    if value and abs(value) < 1e-3:
        return f"{value:.2g}".replace("e-0", "e-")
    return f"{value:,.4g}" if abs(value) < 1e4 else f"{value / 1000:,.4g}k"


def _ticks(low: float, high: float, whole: bool = False) -> list[float]:
    """Return about five round numbers whose range contains [low, high]."""
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    if whole:
        step = max(step, 1.0)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def line_chart(title: str, series: Sequence[Series], percent: bool = False) -> str:
    """Draw curves over steps: values in pale, a centred moving average in full colour.

    With `percent`, values are shares, shown as percentages on an axis from 0 to 1. Return a
    `<figure>`, or "" if there is no value to draw.
    """
    drawn = [(s, xs, ys) for s in series for xs, ys in [s.thinned()] if xs]
    if not drawn:
        return ""
    values = [y for _, _, ys in drawn for y in ys]
    low, high = (0.0, 1.0) if percent else (min(values), max(values))
    if not percent and 0 < low < 0.5 * high:
        low = 0.0
    steps = [x for _, xs, _ in drawn for x in xs]
    frame = _Frame((min(steps), max(steps)), (low, high))
    parts = frame.grid(percent)
    for s, xs, ys in drawn:
        if len(ys) > 20:
            parts.append(f'<path class="raw s{s.colour}" d="{frame.path(xs, ys)}"/>')
        smooth = frame.path(xs, _moving_average(ys))
        parts.append(f'<path class="line s{s.colour}" d="{smooth}"/>')
        stride = math.ceil(len(ys) / MAX_TOOLTIPS)
        for x, y in list(zip(xs, ys, strict=True))[::stride]:
            spot = f'<circle class="spot" cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="6">'
            shown = f"{y * 100:.1f}%" if percent else f"{y:.4g}"
            parts.append(f"{spot}<title>{escape(s.name)}, step {x:g}: {shown}</title></circle>")
    return _figure(title, parts, [(s.name, s.colour) for s, _, _ in drawn if len(series) > 1])


def _moving_average(ys: Sequence[float]) -> list[float]:
    half = len(ys) // 20 if len(ys) > 20 else 0
    windows = [ys[max(i - half, 0) : i + half + 1] for i in range(len(ys))]
    return [sum(window) / len(window) for window in windows]


def stacked_chart(title: str, layers: Sequence[Series]) -> str:
    """Draw layers stacked from the bottom up, such as the seconds of a step's phases.

    All layers have the same steps; a missing value counts as 0.
    """
    layers = [replace(s, ys=[y or 0.0 for y in s.ys]) for s in layers if any(s.ys)]
    if not layers:
        return ""
    thin = [s.thinned() for s in layers]
    xs = thin[0][0]
    highest = max(map(sum, zip(*(ys for _, ys in thin), strict=True)))
    frame = _Frame((xs[0] - 0.5, xs[-1] + 0.5), (0.0, highest))
    width = max((frame.x(1) - frame.x(0)) * ((xs[1] - xs[0]) if len(xs) > 1 else 1) * 0.86, 0.8)
    parts = frame.grid(percent=False)
    base = [0.0] * len(xs)
    for s, (_, ys) in zip(layers, thin, strict=True):
        for i, (x, y) in enumerate(zip(xs, ys, strict=True)):
            low, base[i] = base[i], base[i] + y
            tip = f"{s.name}, step {x:g}: {y:.3g} s"
            ends = frame.y(base[i]), frame.y(low)
            parts.append(_rect(s.colour, frame.x(x) - width / 2, ends, width, tip))
    return _figure(title, parts, [(s.name, s.colour) for s in layers])


def bar_chart(title: str, groups: Sequence[str], bars: Mapping[str, Sequence[Bar | None]]) -> str:
    """Draw groups of bars of shares, one bar per name in each, with 95 % intervals.

    `bars` maps a name to a bar per group, None if it does not apply.
    """
    frame = _Frame((0.0, float(len(groups))), (0.0, 1.0))
    parts = frame.grid(percent=True, x_ticks=False)
    slot = 0.8 / max(len(bars), 1)
    for g, caption in enumerate(groups):
        parts.append(_text("tick", frame.x(g + 0.5), HEIGHT - 10, caption))
        for colour, (name, row) in enumerate(bars.items()):
            if (bar := row[g]) is None:
                continue
            value, error = bar
            left = frame.x(g + 0.1 + slot * (colour + 0.06))
            right = frame.x(g + 0.1 + slot * (colour + 0.94))
            top, middle = frame.y(value), (left + right) / 2
            tip = f"{name}, {caption}: {value * 100:.1f}%"
            parts.append(_rect(colour, left, (top, frame.y(0)), right - left, tip, ' rx="2"'))
            if error:
                top, foot = frame.y(min(value + error, 1.0)), frame.y(max(value - error, 0.0))
                ends = f'x1="{middle:.1f}" x2="{middle:.1f}" y1="{top:.1f}" y2="{foot:.1f}"'
                parts.append(f'<line class="error" {ends}/>')
            parts.append(_text("value", middle, top - 4, f"{value * 100:.0f}"))
    return _figure(title, parts, [(name, i) for i, name in enumerate(bars)])


def _figure(title: str, parts: Sequence[str], legend: Sequence[tuple[str, int]]) -> str:
    keys = "".join(f'<span><i class="b{c}"></i>{escape(name)}</span>' for name, c in legend)
    caption = f"<figcaption><b>{escape(title)}</b>{keys}</figcaption>"
    box = f'viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}"'
    return f"<figure>{caption}<svg {box}>{''.join(parts)}</svg></figure>"
