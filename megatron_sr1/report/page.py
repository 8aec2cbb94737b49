"""A page: its frame and script, sections, tables, and texts.

Parts are strings of HTML; all texts are escaped where a part is made. The page loads nothing but
Plotly's script from beside it and asks no host for anything. Its content security policy allows
only scripts with a random nonce, which no text of a model or data set can know.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from megatron_sr1.report.script import SCRIPT
from megatron_sr1.report.style import STYLE
from megatron_sr1.runtime import files

MAX_TEXT_CHARACTERS = 1500
PLOTLY_FILE = "plotly.min.js"
POLICY = (
    "default-src 'none'; script-src 'nonce-{nonce}'; style-src 'unsafe-inline'; "
    "img-src data: blob:; base-uri 'none'; form-action 'none'"
)


def write_page(path: Path, title: str, body: str, inline: bool = False) -> None:
    """Write a page, with Plotly's script beside it, or inside it (`inline`: 5 MB)."""
    source = _plotly() if inline else ""
    if not inline:
        _place_plotly(path.with_name(PLOTLY_FILE))
    files.write_text(path, page(title, body, source))


def page(title: str, body: str, plotly: str = "") -> str:
    """Wrap HTML parts in a complete document that contains Plotly's source, or names its file."""
    nonce = secrets.token_urlsafe(16)
    opening = f'<script nonce="{nonce}"'
    loaded = f"{opening}>{plotly}" if plotly else f'{opening} src="{PLOTLY_FILE}">'
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY.format(nonce=nonce)}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><main>{body}</main>"
        f"{loaded}</script>{opening}>{SCRIPT}</script></body></html>\n"
    )


def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    return get_plotlyjs().replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _place_plotly(path: Path) -> None:
    """Write Plotly's script, unless it is there."""
    source = _plotly()
    if not path.is_file() or path.stat().st_size != len(source.encode()):
        files.write_text(path, source)


def section(title: str, note: str, *parts: str) -> str:
    """Return a section with a heading; "" if all of its parts are empty."""
    inner = "".join(parts)
    note = f'<p class="note">{escape(note)}</p>' if note else ""
    return f"<section><h2>{escape(title)}</h2>{note}{inner}</section>" if inner else ""


def folded(title: str, *parts: str) -> str:
    """Return parts that a click shows; "" if all are empty."""
    inner = "".join(parts)
    return f"<details><summary>{escape(title)}</summary>{inner}</details>" if inner else ""


def box(kind: str, parts: Iterable[str]) -> str:
    """Arrange parts: grid2 and grid3 side by side where they fit, stack one below another."""
    inner = "".join(parts)
    return f'<div class="{kind}">{inner}</div>' if inner else ""


def tiles(values: Sequence[tuple[str, str]], note: str = "") -> str:
    """Show large numbers with their names, below a note; `values` holds (number, name)."""
    card = '<div class="card tile"><b>{}</b><span>{}</span></div>'
    cards = box("tiles", (card.format(escape(number), escape(name)) for number, name in values))
    return f'<p class="note">{escape(note)}</p>{cards}' if note and cards else cards


def table(head: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    """Return a table, which scrolls by itself if it is wide; "" without rows.

    `kind` is "words" for a table of texts.
    """
    if not rows:
        return ""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>" for row in rows)
    head_row = f"<thead><tr>{top}</tr></thead>" if head else ""
    inner = f'<table class="{kind}">{head_row}<tbody>{body}</tbody></table>'
    return f'<div class="card scroll">{inner}</div>'


def text(value: str | None, absent: str = "none") -> str:
    """Escape a model's text and cut it to a readable length."""
    if value is None:
        return f'<span class="soft">{escape(absent)}</span>'
    return escape(cut(value))


def cut(value: str) -> str:
    """Cut a text to a readable length."""
    value = value.strip()
    if len(value) > MAX_TEXT_CHARACTERS:
        more = len(value) - MAX_TEXT_CHARACTERS
        value = f"{value[:MAX_TEXT_CHARACTERS]} … ({more} more characters)"
    return value
