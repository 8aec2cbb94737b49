"""The report of a run: one HTML page, made only from the files of the run directory.

It can be written again at any time. What a reader looks for first is on top: held-out results, then
the figures that matter, the table of answers x readings, and samples; the rest is folded away.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_sr1.config.rollout import SpansConfig
from megatron_sr1.errors import ConfigError
from megatron_sr1.observability.metrics import read_lines
from megatron_sr1.report import curves, page, samples, verdicts
from megatron_sr1.report.demo_page import DEMO_RUNS, demo_page
from megatron_sr1.report.facts import read_json, setup_section
from megatron_sr1.report.gallery import Form, gallery
from megatron_sr1.report.results import NOTE, RESULTS_FILE, results_html
from megatron_sr1.report.verdicts import Lines
from megatron_sr1.rewards.response import marks_of
from megatron_sr1.rewards.score import VERDICTS

FILES = ("metrics.jsonl", "eval", "rollouts", "vision_sr1")
MAX_BARS = 8
"""Sets with a bar of their own in the figure of all sets."""
TILES = {
    "reward/accuracy": "answer right",
    "reward/self_reward": "self-reward",
    "reward/shortcut_rate": "shortcut rate",
}


def write_report(run_dir: str | Path, inline: bool = False) -> Path:
    """Write `report.html` into the directory of a run, finished or not, or of the demo.

    Plotly's script is written beside it as plotly.min.js, or into it with `inline`.

    Raises:
        ConfigError: the directory holds none.
    """
    run_dir = Path(run_dir)
    if not any((run_dir / name).exists() for name in FILES):
        raise ConfigError(
            f"{run_dir}: no such run; expected a directory with config.json and metrics.jsonl or "
            "eval/, or the demo's"
        )
    is_demo = all((run_dir / name).is_dir() for name in DEMO_RUNS)
    target, name = run_dir / "report.html", run_dir.resolve().name
    title, body = ("digits", demo_page(run_dir)) if is_demo else (name, _run_page(run_dir, name))
    page.write_page(target, f"megatron_sr1: {title}", body, inline)
    return target


def form_of(config: Mapping[str, Any]) -> Form:
    """Return what a run's responses should look like."""
    reward = config.get("reward", {})
    return Form(reward.get("recipe", ""), marks_of(SpansConfig(**reward.get("spans", {}))))


def _run_page(run_dir: Path, name: str) -> str:
    config, lines = read_json(run_dir / "config.json"), read_lines(run_dir / "metrics.jsonl")
    lines = curves.with_mean_length(lines, config)
    results = read_json(run_dir / RESULTS_FILE)
    names = list(dict.fromkeys((*samples.held_out_folders(config), *results.get("sets", {}))))
    found = {each: samples.read_verdicts(run_dir / "eval" / f"{each}.jsonl") for each in names}
    judged = {each: rows for each, rows in found.items() if rows}
    step, rollouts = samples.last_rollouts(run_dir)
    num_steps = max((line["step"] for line in lines), default=0)
    facts = [config.get("stage"), config.get("reward", {}).get("recipe"), f"{num_steps} steps"]
    tables = [verdicts.cross(f"held out, {each}", rows) for each, rows in judged.items()]
    tables.append(verdicts.cross(f"training, step {step}", rollouts))
    held_out, note = verdicts.verdict_table("rate, %", judged), ""
    if results.get("sets"):
        held_out, note = results_html(results), NOTE
    bars = [verdicts.verdict_bars(judged)] if len(judged) <= MAX_BARS else []
    bars.append(_change_bars(run_dir, judged))
    matter, others = curves.run_figures(lines)
    questions = samples.rollout_questions(run_dir, config)
    questions += samples.held_out_questions(run_dir, config, names)
    times = [curves.time_figure("Seconds per step", lines), curves.time_table({"a step": lines})]
    return "".join(
        [
            f"<h1>{page.text(name)}</h1>",
            f'<p class="soft">{page.text(", ".join(str(f) for f in facts if f))}</p>',
            page.tiles(_tiles(lines)),
            page.section("Held out", note, page.box("stack", [page.box("grid2", bars), held_out])),
            page.section("Curves", "", page.box("grid2", matter)),
            page.section(
                "Answers x readings",
                "A reading is the answer from the description alone. Framed: shortcuts, right with "
                "the image and wrong from the description.",
                page.box("grid3", tables),
            ),
            page.section("Samples", "", gallery(questions, form_of(config))),
            page.section(
                "More",
                "",
                page.folded("Time by phase", page.box("stack", times)),
                page.folded(
                    "All other metrics", page.box("grid2", others), curves.constant_table(lines)
                ),
            ),
            setup_section(run_dir),
        ]
    )


def _change_bars(run_dir: Path, judged: Mapping[str, Lines]) -> str:
    """Draw how the first evaluation during training and the last differ, question by question."""
    gaps = {}
    for name, last in judged.items():
        if (first := samples.first_evaluation(run_dir, name)) is not None:
            before = samples.read_verdicts(first[1])
            named = f"{name}, since step {first[0]}"
            gaps[named] = [verdicts.paired(before, last, verdict) for verdict in VERDICTS]
    return verdicts.difference_bars("Change, paired by question", gaps)


def _tiles(lines: Lines) -> list[tuple[str, str]]:
    means = curves.last_means(lines, [*TILES, "actor/loss"])
    found = []
    for name, mean in means.items():
        shown = f"{mean:.1%}" if name in TILES else f"{mean:.3g}"
        found.append((shown, f"{TILES.get(name, 'loss')}, last tenth of the steps"))
    return found
