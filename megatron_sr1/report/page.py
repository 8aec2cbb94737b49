"""The report's page: its frame, style sheet and small parts. All texts are escaped here.

The page runs no scripts and loads nothing, which its content security policy enforces: what a model
wrote stays text.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

MAX_TEXT_CHARACTERS = 1500
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
PALETTE = {
    "light": (
        "#8a919c",
        "#d98324",
        "#1f77a8",
        "#4b9b5f",
        "#b4536f",
        "#7a63b0",
        "#a88c2e",
        "#4aa3a2",
    ),
    "dark": (
        "#8b93a1",
        "#e69f4c",
        "#5aaede",
        "#74c08a",
        "#dd8aa2",
        "#a592dc",
        "#d0b65c",
        "#74c9c7",
    ),
}
STYLE = """
:root{color-scheme:light dark;--bg:#fbfbfa;--card:#fff;--ink:#20242a;--soft:#6a717c;--rule:#e4e6e9;
--good:#2f7d4f;--bad:#b3434b;--mark:31,119,168}
@media(prefers-color-scheme:dark){:root{--bg:#14171b;--card:#1b1f25;--ink:#e3e6ea;--soft:#98a0ac;
--rule:#2c323b;--good:#7cc799;--bad:#e58b91;--mark:90,174,222}}
*{box-sizing:border-box}body{margin:0;background:var(--bg);color:var(--ink);
font:15px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:1120px;margin:0 auto;padding:40px 24px 80px}
h1{font-size:26px;font-weight:650;letter-spacing:-.01em;margin:0 0 4px}
h2{font-size:18px;font-weight:620;margin:44px 0 6px}
h3{font-size:14px;font-weight:600;margin:0 0 8px}
p{margin:4px 0 14px;max-width:76ch}.soft,figcaption,.note{color:var(--soft)}.note{font-size:13px}
.lead{font-size:17px;margin-top:14px}
.grid2,.grid3{display:grid;gap:16px;
grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr))}
.grid3{grid-template-columns:repeat(auto-fill,minmax(min(100%,280px),1fr))}
.card,figure{background:var(--card);border:1px solid var(--rule);border-radius:10px;
padding:14px 16px;margin:0;min-width:0}
.tiles{display:grid;gap:12px;
grid-template-columns:repeat(auto-fit,minmax(150px,1fr));margin:18px 0}
.tile b{display:block;font-size:24px;font-weight:620;font-variant-numeric:tabular-nums}
.tile span{color:var(--soft);font-size:13px}
figcaption{font-size:13px;display:flex;flex-wrap:wrap;gap:2px 14px;margin-bottom:6px}
figcaption b{color:var(--ink);font-weight:600;margin-right:auto}
figcaption i{display:inline-block;width:10px;height:10px;border-radius:3px;margin-right:5px}
svg{display:block;width:100%;height:auto}.grid{stroke:var(--rule)}
.tick,.value{fill:var(--soft);font-size:11px}.value{fill:var(--ink);font-size:10.5px}
.line,.raw{fill:none;stroke-width:2;stroke-linejoin:round}.raw{stroke-width:1;opacity:.3}
.spot{fill:transparent}.spot:hover{fill:var(--soft);fill-opacity:.5}
.error{stroke:var(--ink);stroke-width:1.3;opacity:.65}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:7px 8px;border-bottom:1px solid var(--rule);text-align:right}
th{font-weight:550;color:var(--soft);font-size:13px}th:first-child,td:first-child{text-align:left;white-space:nowrap}
.grid2{align-items:start}.grid2 td{font-size:14px}.stack{display:grid;gap:16px}
tr:last-child td{border-bottom:0}.scroll{overflow-x:auto}
.cross td{text-align:center;border:1px solid var(--rule);padding:12px 6px;font-size:17px}
.cross th{text-align:center;border:0}.cross small{display:block;color:var(--soft);font-size:12px}
.shortcut{outline:2px solid var(--bad);outline-offset:-2px}
.sample{margin:0 0 16px}
.sample header{display:flex;gap:16px;align-items:flex-start;margin-bottom:10px}
.sample img{max-width:256px;max-height:200px;image-rendering:pixelated;border-radius:6px;
border:1px solid var(--rule);background:#fff}
.said{border-top:1px solid var(--rule);padding-top:8px;min-width:0}
dl{display:grid;grid-template-columns:max-content 1fr;gap:2px 12px;margin:0;font-size:14px}
dt{color:var(--soft)}dd{margin:0;white-space:pre-wrap;overflow-wrap:anywhere}
.tag{font-size:12.5px;font-weight:600}.tag span{margin-right:8px;white-space:nowrap}
.good{color:var(--good)}.bad{color:var(--bad)}
@media print{body{background:#fff}figure,.card{break-inside:avoid}}
"""


def _colours() -> str:
    rules = []
    for mode, colours in PALETTE.items():
        named = "".join(f"--c{i}:{colour};" for i, colour in enumerate(colours))
        rule = f":root{{{named}}}"
        rules.append(rule if mode == "light" else f"@media(prefers-color-scheme:dark){{{rule}}}")
    for i in range(len(PALETTE["light"])):
        rules.append(f".s{i}{{stroke:var(--c{i})}}.f{i}{{fill:var(--c{i})}}")
        rules.append(f".b{i}{{background:var(--c{i})}}")
    return "".join(rules)


def page(title: str, body: str) -> str:
    """Wrap HTML parts in a complete document."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}{_colours()}</style></head>"
        f"<body><main>{body}</main></body></html>\n"
    )


def section(title: str, note: str, *parts: str) -> str:
    """Return a section with a heading; "" if all of its parts are empty."""
    inner = "".join(parts)
    note = f'<p class="note">{escape(note)}</p>' if note else ""
    return f"<section><h2>{escape(title)}</h2>{note}{inner}</section>" if inner else ""


def grid(parts: Sequence[str], columns: int = 2) -> str:
    """Arrange parts side by side where they fit."""
    inner = "".join(parts)
    return f'<div class="grid{columns}">{inner}</div>' if inner else ""


def stack(parts: Sequence[str]) -> str:
    """Stack parts vertically, as one cell of a grid."""
    inner = "".join(parts)
    return f'<div class="stack">{inner}</div>' if inner else ""


def tiles(values: Sequence[tuple[str, str]]) -> str:
    """Show large numbers with their names; `values` holds (number, name)."""
    inner = "".join(
        f'<div class="card tile"><b>{escape(number)}</b><span>{escape(name)}</span></div>'
        for number, name in values
    )
    return f'<div class="tiles">{inner}</div>' if inner else ""


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table of texts, its first column left-aligned."""
    if not rows:
        return ""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>" for row in rows)
    inner = f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="card scroll">{inner}</div>'


def cross_table(title: str, cells: dict[tuple[bool, bool], int]) -> str:
    """Return the table of pass 1 x pass 2, with shares and counts; the shortcut is framed.

    Args:
        title: above the table.
        cells: (pass 1 right, pass 2 right) -> samples.
    """
    total = sum(cells.values())
    if not total:
        return ""

    def cell(key: tuple[bool, bool]) -> str:
        share = cells.get(key, 0) / total
        kind = ' class="shortcut"' if key == (True, False) else ""
        tint = f'style="background:rgba(var(--mark),{0.04 + 0.4 * share:.3f})"'
        return f"<td{kind} {tint}>{share:.1%}<small>{cells.get(key, 0)}</small></td>"

    rows = "".join(
        f"<tr><th>pass 1 {'right' if first else 'wrong'}</th>"
        f"{cell((first, True))}{cell((first, False))}</tr>"
        for first in (True, False)
    )
    rate = cells.get((True, False), 0) / total
    head = "<tr><th></th><th>pass 2 right</th><th>pass 2 wrong</th></tr>"
    return (
        f'<div class="card"><h3>{escape(title)}</h3><table class="cross">{head}{rows}</table>'
        f'<p class="note" style="margin:10px 0 0">language-shortcut rate {rate:.1%} of {total}</p>'
        "</div>"
    )


def text(value: str | None, absent: str = "none") -> str:
    """Escape a model's text and cut it to a readable length."""
    if value is None:
        return f'<span class="soft">{escape(absent)}</span>'
    if len(value) > MAX_TEXT_CHARACTERS:
        more = len(value) - MAX_TEXT_CHARACTERS
        value = f"{value[:MAX_TEXT_CHARACTERS]} … ({more} more characters)"
    return escape(value.strip())
