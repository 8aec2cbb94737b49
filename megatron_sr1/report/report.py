"""The report of a run: one HTML file, made only from the files of the run directory.

In: a run directory, or the demo's directory of three of them. Out: `report.html`: curves, time by
phase, the table of pass 1 against pass 2, and samples to look at. It needs neither network nor
scripts, and can be written again at any time.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_sr1.observability.metrics import read_lines
from megatron_sr1.report import gallery, page, panels
from megatron_sr1.report.gallery import Images
from megatron_sr1.report.panels import Lines
from megatron_sr1.rewards.verdicts import VERDICTS, rate
from megatron_sr1.runtime import files

DEMO_RUNS = {
    "cold_start": "cold start",
    "see_think": "GRPO, answer only",
    "vision_sr1": "GRPO + self-reward",
}
NUM_PROMPTS_SHOWN = 6


def write_report(run_dir: str | Path, images: Images | None = None) -> Path:
    """Write `report.html` into a run directory or the demo's directory.

    Args:
        run_dir: with config.json and metrics.jsonl, or with the demo's three runs.
        images: index -> RGB images: of the held-out set for the demo and an evaluation, of the
            training set for other runs (see `shards_of`). None: no images.

    Returns:
        the file's path.
    """
    run_dir = Path(run_dir)
    is_demo = all((run_dir / name).is_dir() for name in DEMO_RUNS)
    text = _demo_page(run_dir, images) if is_demo else _run_page(run_dir, images)
    target = run_dir / "report.html"
    files.write_text(target, text)
    return target


def is_run(run_dir: Path) -> bool:
    """Return True if a directory holds files of a run, finished or not, or of the demo."""
    names = ("metrics.jsonl", "eval", "rollouts", "vision_sr1")
    return any((run_dir / name).exists() for name in names)


def shards_of(run_dir: Path) -> Path | None:
    """Return the directory of the shards with the report's images, from the run's configuration."""
    demo = run_dir / "vision_sr1" / "config.json"
    config = _json(demo if demo.is_file() else run_dir / "config.json")
    held_out = demo.is_file() or config.get("stage") == "eval"
    folder = config.get("data", {}).get("eval" if held_out else "train")
    return Path(folder) if folder else None


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _demo_page(run_dir: Path, images: Images | None) -> str:
    runs = {name: read_lines(run_dir / name / "metrics.jsonl") for name in DEMO_RUNS}
    judged = {
        way: {
            shown: read_lines(run_dir / "eval" / f"{name}_{way}.jsonl")
            for name, shown in DEMO_RUNS.items()
        }
        for way in ("sampled", "greedy")
    }
    sampled = {name: lines for name, lines in judged["sampled"].items() if lines}
    grpo = {DEMO_RUNS[name]: runs[name] for name in ("see_think", "vision_sr1")}
    summary = _json(run_dir / "summary.json")
    bars = [panels.verdict_bars(models, way) for way, models in judged.items()]
    rated = {f"{way}: {name}": rows for way, ms in judged.items() for name, rows in ms.items()}
    sizes = ", ".join(sorted({str(len(lines)) for lines in sampled.values()}))
    body = [
        "<h1>Digits, from scratch</h1>",
        '<p class="soft">A small Qwen2.5-VL learns to read three handwritten digits; then GRPO '
        "twice from one cold start, without and with the self-reward.</p>",
        f'<p class="lead">{_finding(judged)}</p>',
        page.tiles(_demo_tiles(summary, runs["vision_sr1"])),
        page.section(
            "Comparison",
            f"{sizes} held-out questions, answered at temperature 1 and greedily. Intervals are of "
            "95 %; differences are paired, as all were asked the same questions.",
            page.stack(
                [
                    page.grid(bars),
                    panels.verdict_table("rate, %", rated),
                    panels.difference_table(judged),
                ]
            ),
        ),
        page.section(
            "Pass 1 against pass 2",
            "Pass 1 sees the image, pass 2 reads the description alone. Framed: right with the "
            "image, wrong without it, so the description does not contain the answer.",
            page.grid([panels.cross(name, lines) for name, lines in sampled.items()], 3),
        ),
        page.section(
            "Both GRPO runs",
            "Training samples, step by step; full colour is a moving average.",
            page.grid([panels.overlay(name, grpo) for name in panels.TITLES]),
        ),
        page.section(
            "Time",
            "Wall seconds of the GRPO steps by phase.",
            page.stack(
                [
                    page.grid([panels.time_chart(name, lines) for name, lines in grpo.items()]),
                    panels.time_table(grpo),
                ]
            ),
        ),
        page.section("Cold start", "", page.grid(panels.run_charts(runs["cold_start"])[:2])),
        page.section(
            "Samples",
            "Selected by rule, not by hand: the first questions; some where the cold start took a "
            "shortcut and the self-rewarded model does not; some that it still gets wrong.",
            *_question_cards(sampled, images),
        ),
    ]
    return page.page("megatron_sr1: digits", "".join(body))


def _run_page(run_dir: Path, images: Images | None) -> str:
    config, lines = _json(run_dir / "config.json"), read_lines(run_dir / "metrics.jsonl")
    files = {way: read_lines(run_dir / "eval" / f"{way}.jsonl") for way in ("sampled", "greedy")}
    judged = {way: rows for way, rows in files.items() if rows}
    rollouts = _last_rollouts(run_dir)
    facts = [config.get("stage"), config.get("reward", {}).get("recipe"), f"{len(lines)} steps"]
    tables = [panels.cross(f"held out, {way}", rows) for way, rows in judged.items()]
    if rollouts:
        verdicts = [line["reward"] for line in rollouts]
        tables.append(panels.cross(f"training, step {rollouts[0]['step']}", verdicts))
    rates = [panels.verdict_bars(judged), panels.verdict_table("rate, %", judged)]
    body = [
        f"<h1>{page.text(run_dir.resolve().name)}</h1>",
        f'<p class="soft">{page.text(", ".join(str(f) for f in facts if f))}</p>',
        page.tiles(_run_tiles(lines)),
        page.section("Held out", "", page.grid(rates)),
        page.section("Curves", "", page.grid(panels.run_charts(lines))),
        page.section(
            "Pass 1 against pass 2",
            "Framed: right with the image, wrong from the description alone.",
            page.grid(tables, 3),
        ),
        page.section(
            "Time",
            "",
            page.grid(
                [panels.time_chart("Seconds per step", lines), panels.time_table({"": lines})]
            ),
        ),
        page.section("Samples", "", *_sample_cards(judged, rollouts, images)),
    ]
    return page.page(f"megatron_sr1: {run_dir.resolve().name}", "".join(body))


def _finding(judged: Mapping[str, Mapping[str, Lines]]) -> str:
    """Summarize the effect of GRPO on the answers and of the self-reward on the descriptions."""
    if not all(lines for models in judged.values() for lines in models.values()):
        return "The evaluation files in this directory are incomplete."
    cold, plain, rewarded = judged["sampled"].values()
    (s0, s1), (l0, l1) = (
        (rate(plain, verdict) or 0.0, rate(rewarded, verdict) or 0.0)
        for verdict in ("self_reward", "shortcut")
    )
    c, a0, a1 = (rate(lines, "accuracy") or 0.0 for lines in (cold, plain, rewarded))
    greedy = [rate(lines, "accuracy") or 0.0 for lines in judged["greedy"].values()]
    return page.text(
        f"Right answers, sampled: {c:.0%} after the cold start, {a0:.0%} after GRPO rewarded "
        f"answers only, {a1:.0%} after GRPO with the self-reward; decoded greedily: "
        f"{greedy[0]:.0%}, {greedy[1]:.0%}, {greedy[2]:.0%}. With the self-reward, the "
        f"description alone leads to the right answer in {s1:.0%} of the questions; without it in "
        f"{s0:.0%}. Language shortcuts: {l1:.0%} with, {l0:.0%} without."
    )


def _demo_tiles(summary: Mapping[str, Any], lines: Lines) -> list[tuple[str, str]]:
    found = []
    if "seconds" in summary:
        found.append((f"{summary['seconds'] / 60:.1f} min", "whole demo"))
    if "median_step_seconds" in summary:
        found.append((f"{summary['median_step_seconds']:.1f} s", "per GRPO step, median"))
    for way, name in (("sampled", "self_reward"), ("sampled", "accuracy"), ("greedy", "accuracy")):
        value = summary.get("vision_sr1", {}).get(way, {}).get(name)
        if value is not None:
            found.append((f"{value:.1%}", f"{VERDICTS[name].label}, {way}, GRPO + self-reward"))
    return found


def _run_tiles(lines: Lines) -> list[tuple[str, str]]:
    found = []
    tail = lines[-max(len(lines) // 10, 1) :]
    for name in ("reward/accuracy", "reward/self_reward", "reward/shortcut_rate", "actor/loss"):
        values = [line[name] for line in tail if line.get(name) is not None]
        if values:
            mean = statistics.fmean(values)
            shown = f"{mean:.1%}" if name in panels.SHARES else f"{mean:.3g}"
            found.append((shown, f"{panels.TITLES[name]}, last tenth"))
    seconds = [line["time/step_seconds"] for line in lines if "time/step_seconds" in line]
    if seconds:
        found.append((f"{statistics.median(seconds):.3g} s", "a step, median"))
    return found


def _last_rollouts(run_dir: Path) -> Lines:
    """Read the rollouts of the last step."""
    files = [
        (int(match[1]), path)
        for path in (run_dir / "rollouts").glob("step_*.jsonl")
        if (match := re.fullmatch(r"step_(\d+)\.jsonl", path.name))
    ]
    return read_lines(max(files)[1]) if files else []


def _question_cards(judged: Mapping[str, Lines], images: Images | None) -> list[str]:
    if not judged:
        return []
    rows = {name: {line["index"]: line for line in lines} for name, lines in judged.items()}
    return [
        gallery.question_card(
            rule, {name: found[index] for name, found in rows.items() if index in found}, images
        )
        for rule, index in gallery.pick_questions(judged)
    ]


def _sample_cards(judged: Mapping[str, Lines], rollouts: Lines, images: Images | None) -> list[str]:
    """Show rollouts if there are any (`images` is then about the training set)."""
    if not rollouts:
        return _question_cards(judged, images)
    prompts: dict[int, Lines] = {}
    for line in rollouts:
        prompts.setdefault(line["index"], []).append(line)
    chosen = list(prompts.values())[:NUM_PROMPTS_SHOWN]
    return [gallery.rollout_card(lines, images) for lines in chosen]
