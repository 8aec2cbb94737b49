"""The parts of a report's page: frame, style sheet, tables, and samples to look at.

The page runs no scripts and loads nothing, which its content security policy enforces. All texts of
models and data sets are escaped here.
"""

from __future__ import annotations

import base64
import io
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from PIL import Image

from megatron_sr1.errors import SR1Error
from megatron_sr1.observability.sinks import Images
from megatron_sr1.records import RIGHT_FROM
from megatron_sr1.rewards.response import DEFAULT_MARKS, Marks, description_span

log = logging.getLogger(__name__)
Line = Mapping[str, Any]
"""A line of an evaluation or rollout file."""
MAX_TEXT_CHARACTERS = 1500
MAX_SIDE_PIXELS = 512
SMALL_PIXELS = 16384
"""Images up to this many pixels are embedded losslessly and enlarged."""
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
STYLE = """
:root{color-scheme:light dark;--bg:#fbfbfa;--card:#fff;--ink:#20242a;--soft:#6a717c;--rule:#e4e6e9;
--good:#2f7d4f;--bad:#b3434b;--mark:31,119,168;--c0:#8a919c;--c1:#d98324;--c2:#1f77a8;
--c3:#4b9b5f;--c4:#b4536f;--c5:#7a63b0;--c6:#a88c2e;--c7:#4aa3a2}
@media(prefers-color-scheme:dark){:root{--bg:#14171b;--card:#1b1f25;--ink:#e3e6ea;--soft:#98a0ac;
--rule:#2c323b;--good:#7cc799;--bad:#e58b91;--mark:90,174,222;--c0:#8b93a1;--c1:#e69f4c;
--c2:#5aaede;--c3:#74c08a;--c4:#dd8aa2;--c5:#a592dc;--c6:#d0b65c;--c7:#74c9c7}}
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
.tiles{display:grid;gap:12px;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));margin:18px 0}
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
""" + "".join(
    f".s{i}{{stroke:var(--c{i})}}.f{i}{{fill:var(--c{i})}}.b{i}{{background:var(--c{i})}}"
    for i in range(8)
)


def page(title: str, body: str) -> str:
    """Wrap HTML parts in a complete document."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>"
        f"<body><main>{body}</main></body></html>\n"
    )


def section(title: str, note: str, *parts: str) -> str:
    """Return a section with a heading; "" if all of its parts are empty."""
    inner = "".join(parts)
    note = f'<p class="note">{escape(note)}</p>' if note else ""
    return f"<section><h2>{escape(title)}</h2>{note}{inner}</section>" if inner else ""


def box(kind: str, parts: Iterable[str]) -> str:
    """Arrange parts: grid2 and grid3 side by side where they fit, stack one below another."""
    inner = "".join(parts)
    return f'<div class="{kind}">{inner}</div>' if inner else ""


def tiles(values: Sequence[tuple[str, str]]) -> str:
    """Show large numbers with their names; `values` holds (number, name)."""
    card = '<div class="card tile"><b>{}</b><span>{}</span></div>'
    return box("tiles", (card.format(escape(number), escape(name)) for number, name in values))


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table of texts, its first column left-aligned; "" without rows."""
    if not rows:
        return ""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>" for row in rows)
    inner = f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="card scroll">{inner}</div>'


def text(value: str | None, absent: str = "none") -> str:
    """Escape a model's text and cut it to a readable length."""
    if value is None:
        return f'<span class="soft">{escape(absent)}</span>'
    if len(value) > MAX_TEXT_CHARACTERS:
        more = len(value) - MAX_TEXT_CHARACTERS
        value = f"{value[:MAX_TEXT_CHARACTERS]} … ({more} more characters)"
    return escape(value.strip())


def question_card(
    rule: str, runs: Mapping[str, Line], images: Images | None, marks: Marks = DEFAULT_MARKS
) -> str:
    """Show one question, selected by `rule`, with each run's response."""
    said = [_response(name, line, _verdicts(line), marks) for name, line in runs.items()]
    return _card(next(iter(runs.values())), rule, images, box("grid3", said))


def rollout_card(lines: Sequence[Line], images: Images | None, marks: Marks = DEFAULT_MARKS) -> str:
    """Show one prompt of a training step with its best and its worst response."""
    ordered = sorted(lines, key=lambda line: -line["advantage"])
    said = []
    for line in [ordered[0], ordered[-1]] if len(ordered) > 1 else ordered:
        reward = line["reward"]
        verdicts = _verdicts(reward)
        verdicts += '<span class="bad">states the answer</span> ' if reward["leak"] else ""
        verdicts += f'<span class="soft">reward {reward["total"]:.2f}</span>'
        title = f"sample {line['sample']}, advantage {line['advantage']:+.2f}"
        said.append(_response(title, line, verdicts, marks))
    rule = f"best and worst of {len(lines)}" if len(lines) > 2 else f"{len(lines)} responses"
    return _card(lines[0], rule, images, box("grid2", said))


def _card(line: Line, rule: str, images: Images | None, said: str) -> str:
    shown = _pictures(line["index"], images) if images is not None else ""
    question = text(re.sub(r"(?<!\\)<image>", "", str(line["question"])).strip())
    golds = " or ".join(text(gold) for gold in (line["gold"], *line.get("other_golds", ())))
    facts = f"<dl><dt>question</dt><dd>{question}</dd><dt>gold</dt><dd>{golds}</dd></dl>"
    number = f"{line.get('set', '')} no. {int(line['index'])}".strip()
    note = f'<span class="note">{escape(number)}, {escape(rule)}</span>'
    head = f"<header>{shown}<div>{facts}{note}</div></header>"
    return f'<article class="card sample">{head}{said}</article>'


def _response(title: str, line: Line, verdicts: str, marks: Marks) -> str:
    rest = line["response"] or ""
    if (span := description_span(rest, marks)) is not None:
        rest = rest[: span.start] + rest[span.end :]
    return (
        f'<div class="said"><h3>{escape(title)}</h3><div class="tag">{verdicts}</div><dl>'
        f"<dt>saw</dt><dd>{text(line['description'], 'no description')}</dd>"
        f"<dt>answered</dt><dd>{text(rest, 'nothing')}</dd>"
        f"<dt>read back</dt><dd>{text(line['reading'], 'no second pass')}</dd></dl></div>"
    )


def _verdicts(line: Line) -> str:
    """Show the verdicts that an evaluation line or a rollout's reward has."""
    shown = ""
    names = {"accuracy": "answer", "judge": "judge", "self_reward": "read from the description"}
    names |= {"description_exact": "description exact", "format": "form"}
    for verdict, name in names.items():
        if (value := line.get(verdict)) is not None:
            kind, mark = ("good", "✓") if value >= RIGHT_FROM else ("bad", "✗")
            if 0 < value < 1:  # several answers, or a likelihood
                mark += f" {value:.2f}"
            shown += f'<span class="{kind}">{mark} {name}</span> '
    return shown


def _pictures(index: int, images: Images) -> str:
    try:
        found = images(index)
    except SR1Error as error:
        log.warning("report: no image of sample %d: %s", index, error)
        return '<span class="note">image not available</span>'
    return "".join(f'<img alt="image of the question" src="{_data_url(one)}">' for one in found)


def _data_url(image: Image.Image) -> str:
    small = image.width * image.height <= SMALL_PIXELS
    if max(image.size) > MAX_SIDE_PIXELS:
        image = image.copy()
        image.thumbnail((MAX_SIDE_PIXELS, MAX_SIDE_PIXELS))
    elif small:
        factor = max(1, min(256 // image.width, 200 // image.height))
        image = image.resize((image.width * factor, image.height * factor), resample=0)
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "PNG" if small else "JPEG", quality=80, optimize=True)
    kind = "png" if small else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
