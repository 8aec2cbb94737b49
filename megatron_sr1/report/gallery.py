"""Samples to look at: image, question, description, answer, and the answer of the second pass.

In: lines of evaluation or rollout files, and a function that returns images. Out: HTML, in which
all texts of models and data sets are escaped.
"""

from __future__ import annotations

import base64
import io
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from megatron_sr1.errors import SR1Error
from megatron_sr1.records import RIGHT_FROM
from megatron_sr1.report.page import text

if TYPE_CHECKING:
    from PIL import Image

log = logging.getLogger(__name__)
Line = Mapping[str, Any]
Images = Callable[[int], "Sequence[Image.Image]"]
MAX_SIDE_PIXELS = 512
SMALL_PIXELS = 16384
"""Images up to this many pixels are embedded losslessly and enlarged."""


def pick_questions(runs: Mapping[str, Sequence[Line]], each: int = 4) -> list[tuple[str, int]]:
    """Select informative questions by fixed rules, as pairs of rule and index.

    The first questions; those where the first run took a shortcut and the last run's description
    suffices; those that the last run still answers wrongly.

    Args:
        runs: name -> evaluation lines on the same questions.
        each: maximum number of questions per rule.
    """
    rows = {name: {line["index"]: line for line in lines} for name, lines in runs.items()}
    first, last = next(iter(rows.values())), list(rows.values())[-1]
    fixed = [
        i
        for i in last
        if first.get(i, {}).get("shortcut") == 1 and (last[i]["self_reward"] or 0) >= RIGHT_FROM
    ]
    wrong = [i for i in last if last[i]["accuracy"] < RIGHT_FROM]
    rules = {"one of the first": list(last), "fixed": fixed, "still wrong": wrong}
    if len(rows) == 1:
        shortcuts = [i for i in last if last[i]["shortcut"] == 1]
        rules = {"one of the first": list(last), "shortcut": shortcuts, "wrong": wrong}
    chosen: dict[int, str] = {}
    for rule, indices in rules.items():
        for index in [i for i in indices if i not in chosen][:each]:
            chosen[index] = rule
    return [(rule, index) for index, rule in chosen.items()]


def question_card(rule: str, runs: Mapping[str, Line], images: Images | None) -> str:
    """Show one question with each run's responses.

    Args:
        rule: why it was selected.
        runs: name -> its line about this question.
        images: index of a question -> its images; None to show none.
    """
    line = next(iter(runs.values()))
    said = "".join(
        f'<div class="said"><h3>{escape(name)}</h3>{_answers(one, _evaluation_verdicts(one))}</div>'
        for name, one in runs.items()
    )
    return _card(line, rule, images, f'<div class="grid3">{said}</div>')


def rollout_card(lines: Sequence[Line], images: Images | None) -> str:
    """Show one prompt of a training step with its best and its worst response."""
    ordered = sorted(lines, key=lambda line: -line["advantage"])
    chosen = [ordered[0], ordered[-1]] if len(ordered) > 1 else ordered
    said = "".join(
        f'<div class="said"><h3>sample {line["sample"]}, advantage {line["advantage"]:+.2f}</h3>'
        f"{_answers(line, _reward_verdicts(line['reward']))}</div>"
        for line in chosen
    )
    rule = f"best and worst of {len(lines)}" if len(lines) > 2 else f"{len(lines)} responses"
    return _card(lines[0], rule, images, f'<div class="grid2">{said}</div>')


def _card(line: Line, rule: str, images: Images | None, said: str) -> str:
    shown = _pictures(line["index"], images) if images is not None else ""
    question = text(re.sub(r"(?<!\\)<image>", "", str(line["question"])).strip())
    golds = " or ".join(text(gold) for gold in (line["gold"], *line.get("other_golds", ())))
    facts = f"<dl><dt>question</dt><dd>{question}</dd><dt>gold</dt><dd>{golds}</dd></dl>"
    note = f'<span class="note">no. {int(line["index"])}, {escape(rule)}</span>'
    head = f"<header>{shown}<div>{facts}{note}</div></header>"
    return f'<article class="card sample">{head}{said}</article>'


def _answers(line: Line, verdicts: str) -> str:
    rest = line["response"] or ""
    if line["description"]:
        rest = rest.split("</description>", 1)[-1]
    return (
        f'<div class="tag">{verdicts}</div><dl>'
        f"<dt>saw</dt><dd>{text(line['description'], 'no description')}</dd>"
        f"<dt>answered</dt><dd>{text(rest, 'nothing')}</dd>"
        f"<dt>read back</dt><dd>{text(line['reading'], 'no second pass')}</dd></dl>"
    )


def _verdict(name: str, value: float | None, good: bool = True) -> str:
    if value is None:
        return ""
    holds = value >= RIGHT_FROM
    kind = "good" if holds == good else "bad"
    mark = "✓" if holds else "✗"
    if 0 < value < 1:  # several answers, or a likelihood
        mark += f" {value:.2f}"
    return f'<span class="{kind}">{mark} {name}</span> '


def _evaluation_verdicts(line: Line) -> str:
    return (
        _verdict("answer", line["accuracy"])
        + _verdict("read from the description", line["self_reward"])
        + _verdict("description exact", line["description_exact"])
    )


def _reward_verdicts(reward: Line) -> str:
    leak = '<span class="bad">states the answer</span> ' if reward["leak"] else ""
    return (
        _verdict("answer", reward["accuracy"])
        + _verdict("read from the description", reward["self_reward"])
        + _verdict("form", reward["format"])
        + leak
        + f'<span class="soft">reward {reward["total"]:.2f}</span>'
    )


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
