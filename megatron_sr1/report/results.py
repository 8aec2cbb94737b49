"""Tables of an evaluation's results, for its report and for the terminal.

In: `eval/results.json`. Out: the same cells as HTML or for rich. Rates are percentages with their
95 % intervals; docs/evaluation.md describes them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table

from megatron_sr1.report import page

RESULTS_FILE = "eval/results.json"
"""In a run directory; evaluation/results.py writes it."""
LABELS = {
    "accuracy": "accuracy",
    "accuracy_judged": "accuracy, judged",
    "self_reward": "self-reward",
    "shortcut_rate": "shortcut rate",
    "description_exact": "description exact",
}
"""Rate -> label; others, such as `pass@4`, are shown under their names, after accuracy."""
CELLS = {
    "pass1_right_pass2_right": "both right",
    "pass1_right_pass2_wrong": "shortcut",
    "pass1_wrong_pass2_right": "only the reading right",
    "pass1_wrong_pass2_wrong": "both wrong",
}
AVERAGES = {"average": "average of the sets", "weighted_average": "weighted average"}
GROUPS = {"sources": "by source", "categories": "by category"}
NOTE = (
    "Rates in %, with 95 % intervals. The shortcut rate is the share of responses that are "
    "right with the image and wrong from their description alone. The four cells are shares of the "
    "responses with a reading. Kappa is the agreement of rules and judge (Cohen's). "
    "Tokens are those of pass 1; truncated: the share that met the token limit."
)
Row = list[str]


def results_html(results: Mapping[str, Any]) -> str:
    """Return the tables of the sets and of their parts, intervals below their rates."""
    parts = [page.table(head, list(map(_broken, rows))) for head, rows in _tables(results)]
    return page.box("stack", parts)


def results_tables(results: Mapping[str, Any]) -> list[Table]:
    """Return the same tables for the terminal, intervals below their rates."""
    tables = []
    for head, rows in _tables(results):
        table = Table(box=None, pad_edge=False)
        broken = list(map(_broken, rows))
        names, *columns = zip(head, *broken, strict=True)
        table.add_column(names[0], no_wrap=True)
        for column in columns:
            # Without a width, rich shortens narrow cells before it breaks a long header.
            width = max(len(word) for cell in column for word in cell.split())
            table.add_column(column[0], justify="right", width=width)
        for row in broken:
            table.add_row(*row)
        tables.append(table)
    return tables


def _broken(row: Row) -> Row:
    """Put each interval below its rate."""
    return [cell.replace(" (", "\n(") for cell in row]


def _tables(results: Mapping[str, Any]) -> Iterator[tuple[Row, list[Row]]]:
    """Yield head and rows: of all sets with their averages, then of each set's parts."""
    sets = results["sets"]
    same_weights = len({part["weight"] for part in sets.values()}) < 2
    averages = {
        title: {"rates": results[key]}
        for key, title in AVERAGES.items()
        if key in results and not (same_weights and key == "weighted_average")
    }
    if sets:
        yield _table("set", {**sets, **averages})
    for name, part in sets.items():
        for key, title in GROUPS.items():
            if len(part[key]) > 1:
                yield _table(f"{name} {title}", part[key])


def _table(title: str, parts: Mapping[str, Mapping[str, Any]]) -> tuple[Row, list[Row]]:
    """Return head and rows of some parts; columns that none of them has are left out."""
    found = dict.fromkeys(rate for part in parts.values() for rate in part["rates"])
    known = [rate for rate in LABELS if rate in found]
    rates = [*known[:1], *(rate for rate in found if rate not in LABELS), *known[1:]]
    columns: dict[str, Row] = {
        title: list(parts),
        "questions": [str(part.get("questions", "")) for part in parts.values()],
        "left out": [_left_out(part) for part in parts.values()],
    }
    for rate in rates:
        columns[LABELS.get(rate, rate)] = [_percent(p["rates"].get(rate)) for p in parts.values()]
    for cell, label in CELLS.items():
        columns[label] = [_share(part.get("table"), cell) for part in parts.values()]
    judges = [part.get("judge", {}) for part in parts.values()]
    columns["kappa"] = [_fixed(judge.get("judge_kappa"), 2) for judge in judges]
    columns["unjudged"] = [_fixed(judge.get("unjudged"), 0) for judge in judges]
    lengths = [part.get("lengths", {}) for part in parts.values()]
    columns["tokens (p95)"] = [_tokens(each) for each in lengths]
    cut = [each.get("truncated_share") for each in lengths]
    columns["truncated"] = ["" if share is None else f"{100 * share:.1f}" for share in cut]
    columns = {label: cells for label, cells in columns.items() if any(cells)}
    return list(columns), [list(row) for row in zip(*columns.values(), strict=True)]


def _left_out(part: Mapping[str, Any]) -> str:
    """Return the number of questions that could not be graded or read."""
    number = part.get("ungraded", 0) + part.get("skipped", 0)
    return str(number) if number else ""


def _share(table: Mapping[str, int] | None, cell: str) -> str:
    return f"{100 * table[cell] / sum(table.values()):.1f}" if table else ""


def _fixed(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _tokens(lengths: Mapping[str, float]) -> str:
    """Return mean and 95th percentile of the responses' lengths."""
    if "response_tokens_mean" not in lengths:
        return ""
    return f"{lengths['response_tokens_mean']:.0f} ({lengths['response_tokens_p95']:.0f})"


def _percent(rate: Sequence[float] | None) -> str:
    if rate is None:
        return ""
    value, low, high = (f"{100 * each:.1f}" for each in rate)
    return f"{value} ({low}–{high})"
