"""The demo's page: GRPO with and without the self-reward, from one cold start.

In: the demo's directory, which holds the runs of DEMO_RUNS and `eval/RUN_WAY.jsonl`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_sr1.observability.metrics import read_lines
from megatron_sr1.report import curves, page, samples, verdicts
from megatron_sr1.report.facts import read_json, setup_section
from megatron_sr1.report.gallery import Form, Question, gallery
from megatron_sr1.report.verdicts import Lines
from megatron_sr1.rewards.score import VERDICTS, rates

DEMO_RUNS = {
    "cold_start": "cold start",
    "see_think": "GRPO, answer only",
    "vision_sr1": "GRPO + self-reward",
}
WAYS = ("sampled", "greedy")
PAIRED = "means and 95 % intervals, paired, as all were asked the same questions"
COLD, PLAIN, REWARDED = DEMO_RUNS.values()
NUM_QUESTIONS = 32
"""Questions of the gallery for each way of answering."""


def demo_page(run_dir: Path) -> str:
    """Return the body of the page."""
    config = read_json(run_dir / "vision_sr1" / "config.json")
    paths = {
        way: {label: run_dir / "eval" / f"{name}_{way}.jsonl" for name, label in DEMO_RUNS.items()}
        for way in WAYS
    }
    judged = {
        way: {label: samples.read_verdicts(path) for label, path in of_way.items()}
        for way, of_way in paths.items()
    }
    lines = {
        label: curves.with_mean_length(read_lines(run_dir / name / "metrics.jsonl"), config)
        for name, label in DEMO_RUNS.items()
    }
    grpo = {label: _with_ends(label, lines[label], judged) for label in (PLAIN, REWARDED)}
    return "".join(
        [
            "<h1>Digits, from scratch</h1>",
            '<p class="soft">A small Qwen2.5-VL learns to read three handwritten digits; then GRPO '
            "twice from one cold start, without and with the self-reward.</p>",
            f'<p class="lead">{_finding(judged)}</p>',
            page.tiles(_tiles(judged), f"{REWARDED} minus {PLAIN}: {PAIRED}"),
            _comparison(judged),
            _over_steps(grpo),
            _answers_and_readings(judged["sampled"], lines),
            page.section(
                "Samples",
                "Held-out questions with the answers of the three models: each combination of "
                "cells in turn, in the order of the data.",
                gallery(_questions(config, paths), Form("vision_sr1")),
            ),
            _more(lines),
            setup_section(run_dir / "vision_sr1"),
        ]
    )


def _comparison(judged: Mapping[str, Mapping[str, Lines]]) -> str:
    gaps = {
        way: [verdicts.paired(models[PLAIN], models[REWARDED], v) for v in VERDICTS]
        for way, models in judged.items()
    }
    bars = [verdicts.difference_bars(f"{REWARDED} minus {PLAIN}", gaps)]
    bars += [verdicts.verdict_bars(models, way, 0) for way, models in judged.items()]
    rated = {f"{way}: {name}": rows for way, ms in judged.items() for name, rows in ms.items()}
    asked = {len({r["index"] for r in rows}) for ms in judged.values() for rows in ms.values()}
    tables = [verdicts.verdict_table("rate, %", rated), verdicts.difference_table(judged)]
    return page.section(
        "With and without the self-reward",
        f"{', '.join(map(str, sorted(asked - {0})))} held-out questions, answered at temperature 1 "
        f"and greedily. Differences: {PAIRED}.",
        page.box("grid3", bars),
        page.folded("Rates and differences as tables", *tables),
    )


def _over_steps(grpo: Mapping[str, Lines]) -> str:
    held_out = curves.held_out_figures(grpo)
    sizes = {line.get("evaluation/sampled/questions") for each in grpo.values() for line in each}
    asked = ", ".join(f"{size:.0f}" for size in sorted(size for size in sizes if size))
    return page.section(
        "Held out, over the steps",
        f"{f'The first {asked} questions. ' if asked else ''}Step 0 is the cold start. Training "
        "without the self-reward has no readings, so its shortcuts and its self-reward are those "
        "of the evaluations.",
        page.box("grid3", held_out),
    ) + page.section(
        "Training",
        "Both GRPO runs, step by step; in full colour, a moving average.",
        page.box("grid2", curves.training_overlays(grpo)),
    )


def _answers_and_readings(sampled: Mapping[str, Lines], lines: Mapping[str, Lines]) -> str:
    tables = [verdicts.cross(name, rows) for name, rows in sampled.items()]
    over_steps = curves.cell_figure(lines[REWARDED], f"{REWARDED}, training")
    return page.section(
        "Answers x readings",
        "A reading is the answer from the description alone. Framed: right with the image and "
        "wrong from the description, so the description does not contain the answer.",
        page.box("stack", [page.box("grid3", tables), over_steps]),
    )


def _more(lines: Mapping[str, Lines]) -> str:
    grpo = {label: lines[label] for label in (PLAIN, REWARDED)}
    times = [curves.time_figure(f"{name}: seconds per step", each) for name, each in grpo.items()]
    cold, _ = curves.run_figures(lines[COLD])
    return page.section(
        "More",
        "",
        page.folded("Cold start", page.box("grid2", cold)),
        page.folded("Time by phase", page.box("grid2", times), curves.time_table(grpo)),
    )


def _with_ends(label: str, lines: Lines, judged: Mapping[str, Mapping[str, Lines]]) -> Lines:
    """Add the evaluations before and after a run that has none, as steps 0 and last."""
    if not lines or any(name.startswith("evaluation/") for line in lines for name in line):
        return lines
    first, last = (
        {
            f"evaluation/{way}/{name}": value
            for way, models in judged.items()
            for name, value in rates(models[model]).items()
        }
        for model in (COLD, label)
    )
    return [{"step": 0, **first}, *lines[:-1], {**lines[-1], **last}]


def _questions(
    config: Mapping[str, Any], paths: Mapping[str, Mapping[str, Path]]
) -> list[Question]:
    folders, found = samples.held_out_folders(config), list[Question]()
    for way, files in paths.items():
        there = {label: path for label, path in files.items() if path.exists()}
        if there:
            images = samples.images_in(folders.get(way, ""))
            found += samples.compared(way, there, images, NUM_QUESTIONS)
    return found


def _tiles(judged: Mapping[str, Mapping[str, Lines]]) -> list[tuple[str, str]]:
    """Return what the self-reward changed, by way of answering."""
    found = []
    for way, models in judged.items():
        for verdict in ("self_reward", "shortcut", "accuracy"):
            gap = verdicts.paired(models[PLAIN], models[REWARDED], verdict)
            if gap is not None:
                label = f"points, {VERDICTS[verdict][1]}, {way}"
                found.append((verdicts.in_points(gap, sign="+"), label))
    return found


def _finding(judged: Mapping[str, Mapping[str, Lines]]) -> str:
    """Summarize the effect of GRPO on the answers and of the self-reward on the descriptions."""
    if not all(lines for models in judged.values() for lines in models.values()):
        return "The evaluation files in this directory are incomplete."

    def shown(way: str, verdict: str) -> list[str]:
        name = VERDICTS[verdict][0]
        return [f"{rates(lines).get(name, 0.0):.0%}" for lines in judged[way].values()]

    cold, plain, rewarded = shown("sampled", "accuracy")
    _, read_plain, read_rewarded = shown("sampled", "self_reward")
    _, shortcuts_plain, shortcuts_rewarded = shown("sampled", "shortcut")
    return page.text(
        f"Right answers, sampled: {cold} after the cold start, {plain} after GRPO rewarded "
        f"answers only, {rewarded} after GRPO with the self-reward; decoded greedily: "
        f"{', '.join(shown('greedy', 'accuracy'))}. With the self-reward, the description alone "
        f"leads to the right answer in {read_rewarded} of the questions; without it in "
        f"{read_plain}. Shortcuts: {shortcuts_rewarded} with, {shortcuts_plain} without."
    )
