"""Rows of the table of checks: a number, its limit where there is one, what a failure means."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

OK, FAIL, INFO, SKIPPED, ERROR = "ok", "FAIL", "info", "skipped", "ERROR"


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        status: ok, FAIL (beyond its limit), info (no limit), skipped or ERROR (it raised).
        meaning: what it means if the row fails, and what to do.
        note: details, or why there is no number.
        check: name of the check.
        seconds: since the check's start.
    """

    name: str
    status: str = INFO
    value: float | str | None = None
    unit: str = ""
    limit: str = ""
    meaning: str = ""
    note: str = ""
    check: str = ""
    seconds: float = 0.0

    @property
    def is_bad(self) -> bool:
        """True if the check failed or raised."""
        return self.status in (FAIL, ERROR)

    def as_json(self) -> dict[str, Any]:
        """Return the row for JSON, which knows no NaN or infinity: such a value is a string."""
        is_odd = isinstance(self.value, float) and not math.isfinite(self.value)
        return asdict(self) | ({"value": str(self.value)} if is_odd else {})

    def line(self) -> str:
        """Return the row for the terminal; the meaning follows if the row is bad."""
        value = self.value if isinstance(self.value, str) else shown(self.value)
        number = " ".join(part for part in (value, self.unit) if part)
        limit = f"  ({self.limit})" if self.limit else ""
        note = f"  [{self.note}]" if self.note else ""
        text = f"[{self.status:^7}] {self.check}: {self.name}: {number}{limit}{note}"
        return f"{text}\n{'':10}-> {self.meaning}" if self.is_bad and self.meaning else text


def shown(value: float | None) -> str:
    """Format a number with four significant digits; empty for None."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def at_most(
    name: str, value: float, limit: float, meaning: str, unit: str = "", note: str = ""
) -> Row:
    """Return a row that fails above the limit, and for NaN."""
    status = OK if value <= limit else FAIL
    return Row(name, status, value, unit, f"at most {shown(limit)}", meaning, note)


def at_least(
    name: str, value: float, limit: float, meaning: str, unit: str = "", note: str = ""
) -> Row:
    """Return a row that fails below the limit, and for NaN."""
    status = OK if value >= limit else FAIL
    return Row(name, status, value, unit, f"at least {shown(limit)}", meaning, note)


def fact(name: str, value: float | str, unit: str = "", note: str = "") -> Row:
    """Return a row without a limit."""
    return Row(name, INFO, value, unit, note=note)
