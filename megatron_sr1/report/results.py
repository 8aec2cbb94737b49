"""Tables of an evaluation's results, for its report and for the terminal.

In: `eval/results.json`. Out: the same cells as HTML or for rich. Rates are percentages with their
95 % intervals; docs/evaluation.md describes them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table

from megatron_sr1.report import page

LABELS = {
    "accuracy": "accuracy",
    "self_reward": "self-reward",
    "shortcut_rate": "LSR",
    "description_exact": "description exact",
}
"""Rate -> label; others, such as `pass@4`, are shown under their names, after accuracy."""
CELLS = {
    "pass1_right_pass2_right": "both right",
    "pass1_right_pass2_wrong": "shortcut",
    "pass1_wrong_pass2_right": "pass 2 alone",
    "pass1_wrong_pass2_wrong": "both wrong",
}
AVERAGES = {"average": "average of the sets", "weighted_average": "weighted average"}
GROUPS = {"sources": "by source", "categories": "by category"}
NOTE = (
    "Rates in %, with 95 % intervals. LSR, the language-shortcut rate, is the share of responses "
    "that are right with the image and wrong from their description alone. The four cells are "
    "shares of the responses with a pass 2."
)
Row = list[str]


def results_html(results: Mapping[str, Any]) -> str:
    """Return the tables of the sets and of their parts."""
    parts = [page.table(head, rows) for head, rows in _tables(results)]
    return page.box("stack", parts)


def results_tables(results: Mapping[str, Any]) -> list[Table]:
    """Return the same tables for the terminal."""
    tables = []
    for head, rows in _tables(results):
        table = Table(box=None, pad_edge=False)
        for number, title in enumerate(head):
            table.add_column(title, justify="right" if number else "left", no_wrap=not number)
        for row in rows:
            table.add_row(*row)
        tables.append(table)
    return tables


def _tables(results: Mapping[str, Any]) -> Iterator[tuple[Row, list[Row]]]:
    """Yield head and rows: of all sets with their averages, then of each set's parts."""
    sets = results["sets"]
    rates = _rates(sets.values())
    rows = [_row(name, part, rates) for name, part in sets.items()]
    for key, title in AVERAGES.items():
        if key in results:
            rows.append(_row(title, {"rates": results[key]}, rates))
    yield ["set", *_head(rates)], rows
    for name, part in sets.items():
        for key, title in GROUPS.items():
            if len(part[key]) > 1:
                own = _rates(part[key].values())
                yield (
                    [f"{name} {title}", *_head(own)],
                    [_row(label, each, own) for label, each in part[key].items()],
                )


def _rates(parts: Any) -> list[str]:
    """Return the rates that any part has, in the order of `LABELS`."""
    found = dict.fromkeys(rate for part in parts for rate in part["rates"])
    others = [rate for rate in found if rate not in LABELS]
    known = [rate for rate in LABELS if rate in found]
    return [*known[:1], *others, *known[1:]]


def _head(rates: Sequence[str]) -> Row:
    return ["questions", *(LABELS.get(rate, rate) for rate in rates), *CELLS.values()]


def _row(label: str, part: Mapping[str, Any], rates: Sequence[str]) -> Row:
    table = part.get("table") or {}
    total = sum(table.values())
    cells = [f"{100 * table[cell] / total:.1f}" if table else "" for cell in CELLS]
    shown = (_percent(part["rates"].get(rate)) for rate in rates)
    return [label, str(part.get("questions", "")), *shown, *cells]


def _percent(rate: Sequence[float] | None) -> str:
    if rate is None:
        return "–"
    value, low, high = (f"{100 * each:.1f}" for each in rate)
    return f"{value} ({low}–{high})"
