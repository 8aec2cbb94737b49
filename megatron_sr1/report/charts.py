"""Charts as inline SVG, without scripts; the page's style sheet colours them, light and dark.

In: named series of numbers. Out: SVG text. Points have their values as tooltips.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 520, 250
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 12, 30
MAX_POINTS = 400
MAX_TOOLTIPS = 120


@dataclass(frozen=True)
class Series:
    """Numbers over steps.

    Attributes:
        name: in the legend.
        xs: steps, ascending.
        ys: values; None for a missing one.
        colour: index into the page's palette, 0 to 7.
    """

    name: str
    xs: Sequence[float]
    ys: Sequence[float | None]
    colour: int


@dataclass(frozen=True)
class Bar:
    """A bar with its 95 % interval.

    Attributes:
        value: height.
        error: half the interval's width; 0 draws none.
    """

    value: float
    error: float = 0.0


FLAT = 1e-10
"""Values that differ by less are drawn as equal."""


class _Frame:
    """Axes: the mapping from data to pixels, ticks and grid lines."""

    def __init__(self, xs: tuple[float, float], ys: tuple[float, float]) -> None:
        self.x0, self.x1 = xs if xs[0] < xs[1] else (xs[0] - 0.5, xs[0] + 0.5)
        # Differences due to rounding are drawn as a flat line.
        ticks = _ticks(*(ys if ys[1] - ys[0] > FLAT else (ys[0] - 0.5, ys[0] + 0.5)))
        self.y_ticks, self.y0, self.y1 = ticks, ticks[0], ticks[-1]

    def x(self, value: float) -> float:
        return LEFT + (value - self.x0) / (self.x1 - self.x0) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.y0) / (self.y1 - self.y0) * (HEIGHT - TOP - BOTTOM)

    def grid(self, percent: bool, x_ticks: bool = True) -> str:
        parts = []
        for tick in self.y_ticks:
            y = self.y(tick)
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" {_at(y)}/>')
            label = f"{tick * 100:.3g}%" if percent else _number(tick)
            parts.append(f'<text class="tick" x="{LEFT - 7}" y="{y + 4:.1f}" {_END}>{label}</text>')
        if x_ticks:
            for tick in _ticks(self.x0, self.x1, whole=True):
                if self.x0 <= tick <= self.x1:
                    where = f'x="{self.x(tick):.1f}" y="{HEIGHT - 10}"'
                    parts.append(f'<text class="tick" {where} {_MIDDLE}>{_number(tick)}</text>')
        return "".join(parts)


_END, _MIDDLE = 'text-anchor="end"', 'text-anchor="middle"'


def _at(y: float) -> str:
    return f'y1="{y:.1f}" y2="{y:.1f}"'


def _number(value: float) -> str:
    if value and abs(value) < 1e-3:
        return f"{value:.2g}".replace("e-0", "e-")
    return f"{value:,.4g}" if abs(value) < 1e4 else f"{value / 1000:,.4g}k"


def _ticks(low: float, high: float, count: int = 5, whole: bool = False) -> list[float]:
    """Return about `count` round numbers whose range contains [low, high]."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    if whole:
        step = max(step, 1.0)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def line_chart(title: str, series: Sequence[Series], percent: bool = False) -> str:
    """Draw curves over steps: values in pale, a centred moving average in full colour.

    Args:
        title: above the chart.
        series: curves; those without a value are left out.
        percent: values are shares, shown as percentages on an axis from 0 to 1.

    Returns:
        a `<figure>`; "" if there is nothing to draw.
    """
    drawn = [thinned for s in series if (thinned := _thin(s)).xs]
    if not drawn:
        return ""
    values = [y for s in drawn for y in s.ys if y is not None]
    low, high = (0.0, 1.0) if percent else (min(values), max(values))
    if not percent and 0 < low < 0.5 * high:
        low = 0.0
    frame = _Frame((min(s.xs[0] for s in drawn), max(s.xs[-1] for s in drawn)), (low, high))
    parts = [frame.grid(percent)]
    for s in drawn:
        ys = [float(y) for y in s.ys if y is not None]
        smooth = _moving_average(ys)
        if len(ys) > 20:
            parts.append(f'<path class="raw s{s.colour}" d="{_path(frame, s.xs, ys)}"/>')
        parts.append(f'<path class="line s{s.colour}" d="{_path(frame, s.xs, smooth)}"/>')
        stride = math.ceil(len(ys) / MAX_TOOLTIPS)
        for x, y in list(zip(s.xs, ys, strict=True))[::stride]:
            spot = f'<circle class="spot" cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="6">'
            shown = f"{y * 100:.1f}%" if percent else f"{y:.4g}"
            parts.append(f"{spot}<title>{escape(s.name)}, step {x:g}: {shown}</title></circle>")
    legend = [(s.name, s.colour) for s in drawn] if len(series) > 1 else []
    return _figure(title, parts, legend)


def _thin(series: Series) -> Series:
    """Drop missing values and average runs of steps, to at most MAX_POINTS points."""
    pairs = [(x, y) for x, y in zip(series.xs, series.ys, strict=True) if y is not None]
    size = math.ceil(len(pairs) / MAX_POINTS) or 1
    cells = [pairs[i : i + size] for i in range(0, len(pairs), size)]
    xs = [cell[-1][0] for cell in cells]
    ys = [sum(y for _, y in cell) / len(cell) for cell in cells]
    return Series(series.name, xs, ys, series.colour)


def _moving_average(ys: Sequence[float]) -> list[float]:
    half = len(ys) // 20 if len(ys) > 20 else 0
    windows = [ys[max(i - half, 0) : i + half + 1] for i in range(len(ys))]
    return [sum(window) / len(window) for window in windows]


def _path(frame: _Frame, xs: Sequence[float], ys: Sequence[float]) -> str:
    points = zip(xs, ys, strict=True)
    return "M" + "L".join(f"{frame.x(x):.1f} {frame.y(y):.1f}" for x, y in points)


def stacked_chart(title: str, layers: Sequence[Series]) -> str:
    """Draw layers stacked from the bottom up, such as the seconds of a step's phases.

    All layers have the same steps; a missing value counts as 0.
    """
    layers = [s for s in layers if any(s.ys)]
    if not layers:
        return ""
    # Average runs of steps, so that the chart of a long run stays small.
    thin = [_thin(Series(s.name, s.xs, [y or 0.0 for y in s.ys], s.colour)) for s in layers]
    xs = thin[0].xs
    base = [0.0] * len(xs)
    tops = []
    for s in thin:
        base = [b + (y or 0.0) for b, y in zip(base, s.ys, strict=True)]
        tops.append(base)
    frame = _Frame((xs[0] - 0.5, xs[-1] + 0.5), (0.0, max(base)))
    width = max((frame.x(1) - frame.x(0)) * ((xs[1] - xs[0]) if len(xs) > 1 else 1) * 0.86, 0.8)
    parts = [frame.grid(percent=False)]
    below = [0.0] * len(xs)
    for s, top in zip(thin, tops, strict=True):
        for x, low, high in zip(xs, below, top, strict=True):
            y, tall = frame.y(high), frame.y(low) - frame.y(high)
            box = f'x="{frame.x(x) - width / 2:.1f}" y="{y:.1f}" width="{width:.1f}"'
            tip = f"{escape(s.name)}, step {x:g}: {high - low:.3g} s"
            parts.append(f'<rect class="f{s.colour}" {box} height="{tall:.1f}">')
            parts.append(f"<title>{tip}</title></rect>")
        below = top
    return _figure(title, parts, [(s.name, s.colour) for s in thin])


def bar_chart(title: str, groups: Sequence[str], bars: Mapping[str, Sequence[Bar | None]]) -> str:
    """Draw groups of bars of shares, one bar per name in each, with 95 % intervals.

    Args:
        title: above the chart.
        groups: captions below the axis.
        bars: name -> a bar per group, None if it does not apply.
    """
    frame = _Frame((0.0, float(len(groups))), (0.0, 1.0))
    parts = [frame.grid(percent=True, x_ticks=False)]
    slot = 0.8 / max(len(bars), 1)
    for g, caption in enumerate(groups):
        where = f'x="{frame.x(g + 0.5):.1f}" y="{HEIGHT - 10}"'
        parts.append(f'<text class="tick" {where} {_MIDDLE}>{escape(caption)}</text>')
        for colour, (name, row) in enumerate(bars.items()):
            bar = row[g]
            if bar is None:
                continue
            left, right = (
                frame.x(g + 0.1 + slot * (colour + 0.06)),
                frame.x(g + 0.1 + slot * (colour + 0.94)),
            )
            y, middle = frame.y(bar.value), (left + right) / 2
            box = f'x="{left:.1f}" y="{y:.1f}" width="{right - left:.1f}"'
            tip = f"{escape(name)}, {escape(caption)}: {bar.value * 100:.1f}%"
            parts.append(f'<rect class="f{colour}" {box} height="{frame.y(0) - y:.1f}" rx="2">')
            parts.append(f"<title>{tip}</title></rect>")
            top = y
            if bar.error:
                top = frame.y(min(bar.value + bar.error, 1.0))
                foot = frame.y(max(bar.value - bar.error, 0.0))
                ends = f'x1="{middle:.1f}" x2="{middle:.1f}" y1="{top:.1f}" y2="{foot:.1f}"'
                parts.append(f'<line class="error" {ends}/>')
            label = f'<text class="value" x="{middle:.1f}" y="{top - 4:.1f}" {_MIDDLE}>'
            parts.append(f"{label}{bar.value * 100:.0f}</text>")
    return _figure(title, parts, [(name, i) for i, name in enumerate(bars)])


def _figure(title: str, parts: Sequence[str], legend: Sequence[tuple[str, int]]) -> str:
    keys = "".join(f'<span><i class="b{c}"></i>{escape(name)}</span>' for name, c in legend)
    caption = f"<figcaption><b>{escape(title)}</b>{keys}</figcaption>"
    box = f'viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}"'
    return f"<figure>{caption}<svg {box}>{''.join(parts)}</svg></figure>"
