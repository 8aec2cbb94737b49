"""The gallery: questions with their image and what models answered, to filter and to search.

In: lines of evaluation or rollout files. Out: HTML; `script.py` filters it. Marked are the words of
descriptions and answers that differ from the first response to the question, and the words of a
reading that differ from thoughts and answer of the same response.
"""

from __future__ import annotations

import base64
import io
import itertools
import logging
import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from html import escape
from typing import Any

from PIL import Image

from megatron_sr1.errors import SR1Error
from megatron_sr1.observability.sinks import Images
from megatron_sr1.records import RIGHT_FROM
from megatron_sr1.report.page import box, cut, text
from megatron_sr1.rewards.response import DEFAULT_MARKS, Marks, description_span, has_format

log = logging.getLogger(__name__)
Line = Mapping[str, Any]
"""A line of an evaluation file, or of a rollout file with the verdicts of its reward."""
CELLS = {
    (True, True): "both right",
    (True, False): "shortcut",
    (False, True): "only the reading right",
    (False, False): "both wrong",
}
"""Answer right, reading right -> name of the cell in the table of answers x readings."""
NO_READING = "no reading"
VERDICT_NAMES = {
    "accuracy": "answer",
    "judge": "judge",
    "self_reward": "reading",
    "description_exact": "description exact",
    "format": "form",
}
CARDS_SHOWN = 10
"""Cards that are shown at once; a button shows as many more."""
MAX_BYTES = 900_000
"""Of the gallery; further questions are left out."""
MAX_SIDE_PIXELS = 320
SMALL_PIXELS = 16384
"""Images up to this many pixels are embedded losslessly and enlarged by the browser."""
MIN_SIMILARITY = 0.3
"""Share of equal words below which two texts are too different to mark words."""


@dataclass(frozen=True)
class Question:
    """A question with the responses to compare.

    Attributes:
        origin: where it is from, such as "training, step 40" or the name of a held-out set.
        responses: lines by the name of a model or sample, at least one.
        images: reads the images of a sample by its index; None if they are not available.
        note: what is said about the question beside its number.
    """

    origin: str
    responses: Mapping[str, Line]
    images: Images | None = None
    note: str = ""

    @property
    def first(self) -> Line:
        """The first response's line."""
        return next(iter(self.responses.values()))


@dataclass(frozen=True)
class Form:
    """What the form of a response is judged by: the recipe ("" judges none) and its marks."""

    recipe: str = ""
    marks: Marks = field(default_factory=lambda: DEFAULT_MARKS)


def cell(line: Line) -> str:
    """Return the name of a response's cell in the table of answers x readings."""
    if line.get("self_reward") is None:
        return NO_READING
    return CELLS[(line["accuracy"] or 0) >= RIGHT_FROM, line["self_reward"] >= RIGHT_FROM]


def source(line: Line) -> str:
    """Return the training set or data source of a sample, "" if it is not known."""
    return str(line.get("set") or line.get("source") or "")


def varied(kinds: Mapping[int, Hashable], most: int) -> list[int]:
    """Select at most `most` indices, so that each kind has about as many; the first of each.

    `kinds` maps an index to what it is an example of.
    """
    groups: dict[Hashable, list[int]] = {}
    for index, kind in kinds.items():
        groups.setdefault(kind, []).append(index)
    turns = itertools.zip_longest(*groups.values())
    return [index for turn in turns for index in turn if index is not None][:most]


def gallery(questions: Sequence[Question], form: Form = Form()) -> str:
    """Return the filters and a card for each question, up to MAX_BYTES; "" without questions."""
    cards, kept, size = list[str](), list[Question](), 0
    for question in questions:
        card = _card(question, form)
        size += len(card.encode())
        if cards and size > MAX_BYTES:
            break
        cards.append(card)
        kept.append(question)
    if not cards:
        return ""
    lines = [line for question in kept for line in question.responses.values()]
    shared = set.intersection(*(set(question.responses) for question in kept))
    found = {cell(line) for line in lines}
    cells = [name for name in (*CELLS.values(), NO_READING) if name in found]
    filters = [
        _select("cell", "answer x reading", cells),
        _select("run", "of", [name for name in kept[0].responses if name in shared]),
        _select("origin", "from", dict.fromkeys(question.origin for question in kept)),
        _select("source", "source", sorted({source(line) for line in lines} - {""})),
        '<input type="search" data-filter="search" placeholder="search" aria-label="search">',
    ]
    return (
        f'<div class="gallery" data-page="{CARDS_SHOWN}"><div class="filters" hidden>'
        f"{''.join(filters)}<output></output></div>{''.join(cards)}"
        '<button class="more" type="button" hidden>Show more</button></div>'
    )


def _select(name: str, label: str, values: Iterable[str]) -> str:
    """Return a choice among values; "" if there is none."""
    if len(values := list(values)) < 2:
        return ""
    options = "".join(f'<option value="{escape(v)}">{escape(v)}</option>' for v in values)
    choice = f'<select data-filter="{name}"><option value="">all</option>{options}</select>'
    return f"<label>{escape(label)} {choice}</label>"


def _card(question: Question, form: Form) -> str:
    line = question.first
    shown = "" if question.images is None else _pictures(line["index"], question.images)
    asked = text(re.sub(r"(?<!\\)<image>", "", str(line["question"])).strip())
    golds = " or ".join(text(str(gold)) for gold in (line["gold"], *line.get("other_golds", ())))
    facts = f"<dl><dt>question</dt><dd>{asked}</dd><dt>gold answer</dt><dd>{golds}</dd></dl>"
    number = f"{line.get('set', '')} no. {int(line['index'])}".strip()
    notes = [number, *filter(None, (question.origin, question.note))]
    head = f'<header>{shown}<div>{facts}<span class="note">{escape(", ".join(notes))}</span></div>'
    said = [_response(name, one, line, form) for name, one in question.responses.items()]
    kind = "grid3" if len(said) > 2 else "grid2"
    where = f'data-origin="{escape(question.origin)}" data-source="{escape(source(line))}"'
    return f'<article class="card sample" {where}>{head}</header>{box(kind, said)}</article>'


def _response(name: str, line: Line, first: Line, form: Form) -> str:
    answer, other = _without_description(line, form.marks), _without_description(first, form.marks)
    description, reading = line.get("description"), line.get("reading")
    if line is not first:
        shown = _marked(description, first.get("description"), "no description")
        answered = _marked(answer, other, "nothing")
    else:
        shown, answered = text(description, "no description"), text(answer, "nothing")
    of = f'data-cell="{escape(cell(line))}" data-run="{escape(name)}"'
    return (
        f'<div class="said" {of}><h3>{escape(name)}</h3>'
        f'<div class="tag">{_verdicts(line, form)}</div><dl>'
        f"<dt>description</dt><dd>{shown}</dd><dt>answer</dt><dd>{answered}</dd>"
        f"<dt>reading</dt><dd>{_marked(reading, answer, 'none')}</dd></dl></div>"
    )


def _without_description(line: Line, marks: Marks) -> str:
    whole = line["response"] or ""
    span = description_span(whole, marks)
    return (whole if span is None else whole[: span.start] + whole[span.end :]).strip()


def _marked(value: str | None, other: str | None, absent: str) -> str:
    """Return a text with the words marked that another text does not have in their place."""
    if value is None or other is None:
        return text(value, absent)
    shown, words = cut(value), cut(value).split()
    matcher = SequenceMatcher(None, cut(other).split(), words, autojunk=False)
    if matcher.ratio() < MIN_SIMILARITY:
        return escape(shown)
    kept = {
        i for _, start, size in matcher.get_matching_blocks() for i in range(start, start + size)
    }
    numbers = itertools.count()

    def word(found: re.Match[str]) -> str:
        one = escape(found[0])
        return one if next(numbers) in kept else f"<mark>{one}</mark>"

    # What is between the words is whitespace, which needs no escaping.
    return re.sub(r"\S+", word, shown)


def _verdicts(line: Line, form: Form) -> str:
    """Show the verdicts that a line has, and of an evaluated response also that on its form."""
    found = {name: line.get(name) for name in VERDICT_NAMES}
    response = line["response"] if form.recipe and "prompt" in line else None
    if found["format"] is None and response is not None:
        found["format"] = has_format(response, form.recipe, form.marks)
    shown = ""
    for verdict, value in found.items():
        if value is not None:
            kind, sign = ("good", "✓") if value >= RIGHT_FROM else ("bad", "✗")
            if 0 < value < 1:  # several answers, or a likelihood
                sign += f" {value:.2f}"
            shown += f'<span class="{kind}">{sign} {VERDICT_NAMES[verdict]}</span> '
    if line.get("leak"):
        shown += '<span class="bad">description states the answer</span> '
    if line.get("total") is not None:
        shown += f'<span class="soft">reward {line["total"]:.2f}</span>'
    return shown


def _pictures(index: int, images: Images) -> str:
    try:
        found = images(index)
    except SR1Error as error:
        log.warning("report: no image of sample %d: %s", index, error)
        return '<span class="note">image not available</span>'
    return "".join(map(_picture, found))


def _picture(image: Image.Image) -> str:
    small = image.width * image.height <= SMALL_PIXELS
    factor = max(1, min(256 // image.width, 200 // image.height)) if small else 1
    if max(image.size) > MAX_SIDE_PIXELS:
        image = image.copy()
        image.thumbnail((MAX_SIDE_PIXELS, MAX_SIDE_PIXELS))
    buffer = io.BytesIO()
    kind = "png" if small else "webp"
    image.convert("RGB").save(buffer, kind, quality=70, optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    size = f'width="{image.width * factor}" height="{image.height * factor}"'
    looks = f'class="pixels" {size}' if small else size
    return f'<img alt="image of the question" {looks} src="data:image/{kind};base64,{data}">'
