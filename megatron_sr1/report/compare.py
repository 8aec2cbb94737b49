"""Runs side by side: tables for the terminal, and one HTML page.

In: runs as `compared.py` reads them. Out: settings that differ, held-out rates, their differences
and training; on the page also curves on the same axes and the questions on which verdicts differ.
Differences are means over the questions that both runs answered, with the normal 95 % interval of
the paired differences (`verdicts.paired`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from rich.table import Table
from rich.text import Text

from megatron_sr1.config.rollout import SpansConfig
from megatron_sr1.errors import ConfigError
from megatron_sr1.report import curves, page, verdicts
from megatron_sr1.report.compared import Compared, ComparedRun
from megatron_sr1.report.facts import flat, shown
from megatron_sr1.report.gallery import Form, Question, gallery
from megatron_sr1.report.samples import compared as compared_questions
from megatron_sr1.report.samples import images_in
from megatron_sr1.report.verdicts import Lines, in_points, paired, with_interval
from megatron_sr1.rewards.response import marks_of
from megatron_sr1.rewards.score import VERDICTS

PAGE_FILE = "compare.html"
NUM_QUESTIONS = 40
"""Questions of the gallery of all held-out sets together, at least MIN_OF_SET of each."""
MIN_OF_SET = 4
MAX_SETTING_CHARACTERS = 60
"""Of a value in the terminal; the page has all of it."""
TRAINING = {
    "reward/total": "reward",
    "reward/accuracy": "answer right",
    "reward/self_reward": "self-reward",
    "reward/shortcut_rate": "shortcut rate",
    "actor/loss": "loss",
    "actor/reference_kl": "KL to the reference",
    "actor/entropy": "entropy",
    curves.MEAN_LENGTH: "response tokens",
    "time/step_seconds": "seconds per step",
}
"""Metrics of the training that are compared as means over the last tenth of the steps."""
PAIRED = (
    "Differences are means over the questions that both runs answered; 95 % intervals are normal, "
    "of the paired differences."
)
Rows = list[list[str]]


def comparison_tables(compared: Compared) -> list[Table]:
    """Return the tables for the terminal."""
    names = [run.name for run in compared.runs]
    settings = [[cut(each) for each in row] for row in different_settings(compared.runs)]
    found = [_table("Settings that differ", ["setting", *names], settings)]
    for held_out, judged in compared.judged.items():
        head, rows = held_out_rows(judged)
        found.append(_table(f"Held out: {held_out}, % (differences in points)", head, rows))
    training = training_rows(compared.runs)
    found.append(_table("Training, mean of the last tenth of the steps", ["", *names], training))
    return [table for table in found if table.row_count]


def cut(value: str) -> str:
    """Shorten the value of a setting for the terminal."""
    most = MAX_SETTING_CHARACTERS
    return value if len(value) <= most else f"{value[: most // 2]} … {value[-most // 2 :]}"


def _table(title: str, head: Sequence[str], rows: Rows) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for number, name in enumerate(head):
        table.add_column(Text(name), justify="right" if number else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def different_settings(runs: Sequence[ComparedRun]) -> Rows:
    """Return key and values of the settings that are not the same in all runs, but `output`."""
    flats = [flat(run.config) for run in runs]
    rows = []
    for key in sorted({key for each in flats for key in each} - {"output"}):
        values = [shown(each[key]) if key in each else "–" for each in flats]
        if len(set(values)) > 1:
            rows.append([key, *values])
    return rows


def held_out_rows(judged: Mapping[str, Lines]) -> tuple[list[str], Rows]:
    """Return head and rows of a set: the rates of each run, then the difference of every two."""
    kept = [v for v in VERDICTS if any(with_interval(rows, v) for rows in judged.values())]
    rows: Rows = []
    for name, lines in judged.items():
        number = str(len({line["index"] for line in lines}))
        rows.append([name, number, *(in_points(with_interval(lines, v)) for v in kept)])
    for (one, first), (other, second) in itertools.combinations(judged.items(), 2):
        both = {line["index"] for line in first} & {line["index"] for line in second}
        gaps = (in_points(paired(first, second, v), sign="+") for v in kept)
        rows.append([f"{other} minus {one}", str(len(both)), *gaps])
    return ["", "questions", *(VERDICTS[v][1] for v in kept)], rows


def training_rows(runs: Sequence[ComparedRun]) -> Rows:
    """Return the means of the last tenth of the steps, for metrics that two or more runs have."""
    means = [curves.last_means(run.metrics, list(TRAINING)) for run in runs]
    return [
        [label, *(f"{each[name]:.4g}" if name in each else "–" for each in means)]
        for name, label in TRAINING.items()
        if sum(name in each for each in means) > 1
    ]


def write_comparison(compared: Compared, target: Path | None = None, inline: bool = False) -> Path:
    """Write the page, by default into the first run's directory; return its path.

    Plotly's script is written beside it, or into it with `inline`.

    Raises:
        ConfigError: it cannot be written there.
    """
    path = target or compared.runs[0].directory / PAGE_FILE
    names = " and ".join(run.name for run in compared.runs)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        page.write_page(path, f"megatron_sr1: {names}", _body(compared), inline)
    except OSError as error:
        problem = f"{path}: cannot be written ({error.strerror})"
        raise ConfigError(f"{problem}; name another file with --output") from None
    return path


def _body(compared: Compared) -> str:
    runs = {run.name: run.metrics for run in compared.runs if run.metrics}
    names = [run.name for run in compared.runs]
    parts = [
        f"<h1>{page.text(' and '.join(names))}</h1>",
        *(f'<p class="note">{page.text(note)}</p>' for note in compared.notes),
        page.section("Held out", PAIRED, _held_out(compared)),
        page.section("Held out, over the steps", "", _grid(curves.held_out_figures(runs))),
        page.section("Training", "", _grid(curves.training_overlays(runs))),
        page.section(
            "Settings that differ",
            "",
            page.table(["setting", *names], different_settings(compared.runs), "words"),
        ),
        page.section(
            "Where they differ",
            "Questions on which the verdicts of the runs differ: each combination of cells in "
            "turn, in the order of the data.",
            gallery(list(_questions(compared)), _form(compared.runs)),
        ),
        page.section(
            "More",
            "",
            page.folded(
                "Training as a table, means of the last tenth of the steps",
                page.table(["", *names], training_rows(compared.runs)),
            ),
            page.folded("Time by phase", curves.time_table(runs)),
        ),
    ]
    return "".join(parts)


def _grid(figures: Sequence[str]) -> str:
    return page.box("grid2", figures)


def _held_out(compared: Compared) -> str:
    """Return differences and rates of each set as figures and a table, then answers x readings."""
    parts = []
    for held_out, judged in compared.judged.items():
        gaps = {
            f"{other} minus {one}": [paired(first, second, v) for v in VERDICTS]
            for (one, first), (other, second) in itertools.combinations(judged.items(), 2)
        }
        title = next(iter(gaps)) if len(gaps) == 1 else "differences"
        bars = [
            verdicts.difference_bars(f"{held_out}: {title}", gaps),
            verdicts.verdict_bars(judged, held_out),
        ]
        head, rows = held_out_rows(judged)
        crosses = [verdicts.cross(f"{held_out}: {name}", rows) for name, rows in judged.items()]
        parts += [_grid(bars), page.table([held_out, *head[1:]], rows), page.box("grid3", crosses)]
    return page.box("stack", filter(None, parts))


def _questions(compared: Compared) -> Iterator[Question]:
    """Select the questions of all sets on which the runs' cells differ."""
    each = max(NUM_QUESTIONS // max(len(compared.judged), 1), MIN_OF_SET)
    for held_out, judged in compared.judged.items():
        files = {run.name: run.answers[held_out] for run in compared.runs if run.name in judged}
        images = images_in(compared.folder(held_out))
        yield from compared_questions(held_out, files, images, each, only_different=True)


def _form(runs: Sequence[ComparedRun]) -> Form:
    """Return the form of the runs' responses; verdicts on it only if all have the same."""
    rewards = [run.config.get("reward", {}) for run in runs]
    marks = {marks_of(SpansConfig(**reward.get("spans", {}))) for reward in rewards}
    recipes = {reward.get("recipe", "") for reward in rewards}
    if len(marks) > 1:
        return Form()
    return Form(recipes.pop() if len(recipes) == 1 else "", marks.pop())
