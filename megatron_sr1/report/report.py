"""The report of a run: one HTML file, made only from the files of the run directory.

It holds curves, time by phase, the table of pass 1 against pass 2, and samples to look at. It needs
neither network nor scripts, and can be written again at any time.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

from megatron_sr1.config.rollout import SpansConfig
from megatron_sr1.data.shards import ShardReader
from megatron_sr1.errors import ConfigError
from megatron_sr1.observability.metrics import each_line, read_lines
from megatron_sr1.records import RIGHT_FROM
from megatron_sr1.report import page, panels
from megatron_sr1.report.page import Images
from megatron_sr1.report.panels import Lines
from megatron_sr1.report.results import NOTE, RESULTS_FILE, results_html
from megatron_sr1.rewards.response import DEFAULT_MARKS, Marks, marks_of
from megatron_sr1.rewards.score import VERDICTS, rate
from megatron_sr1.runtime import files

DEMO_RUNS = {
    "cold_start": "cold start",
    "see_think": "GRPO, answer only",
    "vision_sr1": "GRPO + self-reward",
}
WAYS = ("sampled", "greedy")
FILES = ("metrics.jsonl", "eval", "rollouts", "vision_sr1")
NUM_PROMPTS_SHOWN = 6
NUM_QUESTIONS_SHOWN = 4
"""By each rule, in an evaluation of at most MAX_BARS sets; 1 if there are more."""
MAX_BARS = 8
"""Sets with a bar of their own in the chart of all sets, which has as many colours."""


def write_report(run_dir: str | Path) -> Path:
    """Write `report.html` into the directory of a run, finished or not, or of the demo.

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
    target = run_dir / "report.html"
    files.write_text(target, _demo_page(run_dir) if is_demo else _run_page(run_dir))
    return target


def held_out_folders(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the directory of each held-out set, by its name, also of runs with `data.eval`."""
    sets = config.get("evaluation", {}).get("sets", {})
    old = config.get("data", {}).get("eval")
    return {name: each["path"] for name, each in sets.items()} or dict.fromkeys(WAYS, old or "")


def training_folders(config: Mapping[str, Any]) -> list[str]:
    """Return the directories of the training sets, in the order of their samples."""
    data = config.get("data", {})
    return [each["path"] for each in data.get("mixture", {}).values()] or [data.get("train", "")]


def images_in(*folders: str) -> Images | None:
    """Return what reads a sample's images, if all shards still exist."""
    is_there = all(folder and any(Path(folder).glob("*.tar")) for folder in folders)
    return ShardReader(*folders).images if is_there else None


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _demo_page(run_dir: Path) -> str:
    folders = held_out_folders(_json(run_dir / "vision_sr1" / "config.json"))
    runs = {name: read_lines(run_dir / name / "metrics.jsonl") for name in DEMO_RUNS}
    judged: dict[str, dict[str, Lines]] = {way: {} for way in WAYS}
    files = {shown: run_dir / "eval" / f"{name}_sampled.jsonl" for name, shown in DEMO_RUNS.items()}
    for way, (name, shown) in product(WAYS, DEMO_RUNS.items()):
        judged[way][shown] = read_verdicts(run_dir / "eval" / f"{name}_{way}.jsonl")
    sampled = {name: lines for name, lines in judged["sampled"].items() if lines}
    grpo = {DEMO_RUNS[name]: runs[name] for name in ("see_think", "vision_sr1")}
    bars = [panels.verdict_bars(models, way) for way, models in judged.items()]
    rated = {f"{way}: {name}": rows for way, ms in judged.items() for name, rows in ms.items()}
    sizes = ", ".join(sorted({str(len(lines)) for lines in sampled.values()}))
    tables = [panels.verdict_table("rate, %", rated), panels.difference_table(judged)]
    times = [panels.time_chart(name, lines) for name, lines in grpo.items()]
    cold = panels.run_charts(runs["cold_start"])[:2]
    body = [
        "<h1>Digits, from scratch</h1>",
        '<p class="soft">A small Qwen2.5-VL learns to read three handwritten digits; then GRPO '
        "twice from one cold start, without and with the self-reward.</p>",
        f'<p class="lead">{_finding(judged)}</p>',
        page.tiles(_demo_tiles(_json(run_dir / "summary.json"))),
        page.section(
            "Comparison",
            f"{sizes} held-out questions, answered at temperature 1 and greedily. Intervals are of "
            "95 %; differences are paired, as all were asked the same questions.",
            page.box("stack", [page.box("grid2", bars), *tables]),
        ),
        page.section(
            "Pass 1 against pass 2",
            "Pass 1 sees the image, pass 2 reads the description alone. Framed: right with the "
            "image, wrong without it, so the description does not contain the answer.",
            page.box("grid3", [panels.cross(name, lines) for name, lines in sampled.items()]),
        ),
        page.section(
            "Both GRPO runs",
            "Training samples, step by step; full colour is a moving average.",
            page.box("grid2", [panels.overlay(name, grpo) for name in panels.TITLES]),
        ),
        page.section(
            "Time",
            "Wall seconds of the GRPO steps by phase.",
            page.box("stack", [page.box("grid2", times), panels.time_table(grpo)]),
        ),
        page.section("Cold start", "", page.box("grid2", cold)),
        page.section(
            "Samples",
            "Selected by rule, not by hand: the first questions; some where the cold start took a "
            "shortcut and the self-rewarded model does not; some that it still gets wrong.",
            *_question_cards(sampled, files, images_in(folders["sampled"])),
        ),
    ]
    return page.page("megatron_sr1: digits", "".join(body))


def _run_page(run_dir: Path) -> str:
    config, lines = _json(run_dir / "config.json"), read_lines(run_dir / "metrics.jsonl")
    folders = held_out_folders(config)
    results = _json(run_dir / RESULTS_FILE)
    folders |= {name: "" for name in results.get("sets", {}) if name not in folders}
    files = {name: run_dir / "eval" / f"{name}.jsonl" for name in folders}
    found = {name: read_verdicts(path) for name, path in files.items()}
    judged = {name: rows for name, rows in found.items() if rows}
    rollouts, name = _last_rollouts(run_dir), run_dir.resolve().name
    marks = marks_of(SpansConfig(**config.get("reward", {}).get("spans", {})))
    facts = [config.get("stage"), config.get("reward", {}).get("recipe"), f"{len(lines)} steps"]
    tables = [panels.cross(f"held out, {name}", rows) for name, rows in judged.items()]
    if rollouts:
        verdicts = [line["reward"] for line in rollouts]
        tables.append(panels.cross(f"training, step {rollouts[0]['step']}", verdicts))
    rates = [panels.verdict_bars(judged)] if len(judged) <= MAX_BARS else []
    held_out, note = panels.verdict_table("rate, %", judged), ""
    if results.get("sets"):
        held_out, note = results_html(results), NOTE
    times = [panels.time_chart("Seconds per step", lines), panels.time_table({"a step": lines})]
    cards = []
    if rollouts:
        images = images_in(*training_folders(config))
        cards = _rollout_cards(rollouts, images, marks)
    each = NUM_QUESTIONS_SHOWN if len(judged) <= MAX_BARS else 1
    for folder in dict.fromkeys(folders.values()) if not rollouts else ():
        same = {name: rows for name, rows in judged.items() if folders[name] == folder}
        cards += _question_cards(same, files, images_in(folder), each, marks)
    body = [
        f"<h1>{page.text(name)}</h1>",
        f'<p class="soft">{page.text(", ".join(str(f) for f in facts if f))}</p>',
        page.tiles(_run_tiles(lines)),
        page.section("Held out", note, page.box("stack", [*rates, held_out])),
        page.section("Curves", "", page.box("grid2", panels.run_charts(lines))),
        page.section(
            "Pass 1 against pass 2",
            "Framed: right with the image, wrong from the description alone.",
            page.box("grid3", tables),
        ),
        page.section("Time", "", page.box("grid2", times)),
        page.section("Samples", "", *cards),
    ]
    return page.page(f"megatron_sr1: {name}", "".join(body))


def _finding(judged: Mapping[str, Mapping[str, Lines]]) -> str:
    """Summarize the effect of GRPO on the answers and of the self-reward on the descriptions."""
    if not all(lines for models in judged.values() for lines in models.values()):
        return "The evaluation files in this directory are incomplete."

    def rates(way: str, verdict: str) -> list[str]:
        return [f"{rate(lines, verdict) or 0.0:.0%}" for lines in judged[way].values()]

    cold, plain, rewarded = rates("sampled", "accuracy")
    _, read_plain, read_rewarded = rates("sampled", "self_reward")
    _, shortcuts_plain, shortcuts_rewarded = rates("sampled", "shortcut")
    return page.text(
        f"Right answers, sampled: {cold} after the cold start, {plain} after GRPO rewarded "
        f"answers only, {rewarded} after GRPO with the self-reward; decoded greedily: "
        f"{', '.join(rates('greedy', 'accuracy'))}. With the self-reward, the description alone "
        f"leads to the right answer in {read_rewarded} of the questions; without it in "
        f"{read_plain}. Language shortcuts: {shortcuts_rewarded} with, {shortcuts_plain} without."
    )


def _demo_tiles(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    found = []
    if "seconds" in summary:
        found.append((f"{summary['seconds'] / 60:.1f} min", "whole demo"))
    if "median_step_seconds" in summary:
        found.append((f"{summary['median_step_seconds']:.1f} s", "per GRPO step, median"))
    for way, name in (("sampled", "self_reward"), ("sampled", "accuracy"), ("greedy", "accuracy")):
        value = summary.get("vision_sr1", {}).get(way, {}).get(name)
        if value is not None:
            found.append((f"{value:.1%}", f"{VERDICTS[name][1]}, {way}, GRPO + self-reward"))
    return found


def _run_tiles(lines: Lines) -> list[tuple[str, str]]:
    found, tail = [], lines[-max(len(lines) // 10, 1) :]
    for name in ("reward/accuracy", "reward/self_reward", "reward/shortcut_rate", "actor/loss"):
        if (mean := rate(tail, name)) is not None:
            shown = f"{mean:.1%}" if name in panels.SHARES else f"{mean:.3g}"
            found.append((shown, f"{panels.TITLES[name]}, last tenth"))
    seconds = [line["time/step_seconds"] for line in lines if "time/step_seconds" in line]
    if seconds:
        found.append((f"{statistics.median(seconds):.3g} s", "a step, median"))
    return found


def _last_rollouts(run_dir: Path) -> Lines:
    """Read the rollouts of the last step."""
    found = (run_dir / "rollouts").glob("step_*.jsonl")
    steps = {int(m[1]): path for path in found if (m := re.fullmatch(r"step_(\d+)", path.stem))}
    return read_lines(steps[max(steps)]) if steps else []


def read_verdicts(path: Path) -> Lines:
    """Read the lines of an evaluation file without their texts."""
    kept = ("index", *VERDICTS)
    return [{name: line.get(name) for name in kept} for line in each_line(path)]


def _question_cards(
    judged: Mapping[str, Lines],
    files: Mapping[str, Path],
    images: Images | None,
    each: int = NUM_QUESTIONS_SHOWN,
    marks: Marks = DEFAULT_MARKS,
) -> list[str]:
    """Show informative questions with the responses of each model or way of answering.

    `judged` and `files` hold the verdicts and the file of each by its name.
    """
    chosen = pick_questions(judged, each) if judged else []
    wanted, lines = {index for _, index in chosen}, dict[int, dict[str, Any]]()
    for name in judged:
        for line in each_line(files[name]):
            if line["index"] in wanted:
                lines.setdefault(line["index"], {}).setdefault(name, line)
    return [page.question_card(rule, lines[index], images, marks) for rule, index in chosen]


def pick_questions(
    judged: Mapping[str, Lines], each: int = NUM_QUESTIONS_SHOWN
) -> list[tuple[str, int]]:
    """Select at most `each` questions by each of some fixed rules, as pairs of rule and index.

    The first questions; those where the first run took a shortcut and the last run's description
    suffices (of one run: its shortcuts); those that the last run still answers wrongly. `judged`
    holds the runs' evaluation lines on the same questions.
    """
    rows = [{line["index"]: line for line in lines} for lines in judged.values()]
    first, last = rows[0], rows[-1]
    shortcuts = [i for i in last if first.get(i, {}).get("shortcut") == 1]
    wrong = [i for i in last if last[i]["accuracy"] < RIGHT_FROM]
    rules = {"one of the first": list(last), "shortcut": shortcuts, "wrong": wrong}
    if len(rows) > 1:
        fixed = [i for i in shortcuts if (last[i]["self_reward"] or 0) >= RIGHT_FROM]
        rules = {"one of the first": list(last), "fixed": fixed, "still wrong": wrong}
    chosen: dict[int, str] = {}
    for rule, indices in rules.items():
        chosen |= dict.fromkeys([i for i in indices if i not in chosen][:each], rule)
    return [(rule, index) for index, rule in chosen.items()]


def _rollout_cards(rollouts: Lines, images: Images | None, marks: Marks) -> list[str]:
    """Show the first prompts of a training step."""
    prompts: dict[int, Lines] = {}
    for line in rollouts:
        prompts.setdefault(line["index"], []).append(line)
    shown = list(prompts.values())[:NUM_PROMPTS_SHOWN]
    return [page.rollout_card(lines, images, marks) for lines in shown]
