"""Questions for the gallery, from a run's rollouts and its evaluations.

Questions are selected by rule: those of each combination of cells (answer right, reading right) and
source in turn, in the order of the data. Of a file of any size only the verdicts are kept.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_sr1.data.shards import ShardReader
from megatron_sr1.observability.metrics import each_line, read_lines
from megatron_sr1.report.gallery import Images, Line, Question, cell, source, varied
from megatron_sr1.rewards.score import VERDICTS

Lines = list[dict[str, Any]]
NUM_HELD_OUT = 24
"""Questions of all held-out sets together, at least MIN_OF_SET of each."""
MIN_OF_SET = 2
NUM_PROMPTS = {-1: 24, 0: 8}
"""Training step, by its place among those with rollouts -> number of its prompts."""


def held_out_folders(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the directory of each held-out set, by its name, also of runs with `data.eval`."""
    sets = config.get("evaluation", {}).get("sets", {})
    old = config.get("data", {}).get("eval")
    return {name: each["path"] for name, each in sets.items()} or dict.fromkeys(
        ("sampled", "greedy"), old or ""
    )


def training_folders(config: Mapping[str, Any]) -> list[str]:
    """Return the directories of the training sets, in the order of their samples."""
    data = config.get("data", {})
    return [each["path"] for each in data.get("mixture", {}).values()] or [data.get("train", "")]


def images_in(*folders: str) -> Images | None:
    """Return what reads a sample's images, if all shards still exist."""
    is_there = all(folder and any(Path(folder).glob("*.tar")) for folder in folders)
    return ShardReader(*folders).images if is_there else None


def read_verdicts(path: Path) -> Lines:
    """Read the lines of an evaluation file without their texts."""
    kept = ("index", "source", *VERDICTS)
    return [{name: line.get(name) for name in kept} for line in each_line(path)]


def compared(
    origin: str,
    files: Mapping[str, Path],
    images: Images | None,
    most: int,
    only_different: bool = False,
) -> list[Question]:
    """Select questions that all of some evaluations asked, with the response of each.

    Args:
        origin: the name of the held-out set.
        files: evaluation file by the name of its model.
        images: reads the images of the set.
        most: number of questions.
        only_different: select only those whose responses are not all of the same cell.
    """
    judged: dict[int, list[str]] = {}
    sources: dict[int, str] = {}
    for path in files.values():
        seen = set()
        for line in read_verdicts(path):
            if line["index"] not in seen:  # of several responses, the first
                seen.add(line["index"])
                judged.setdefault(line["index"], []).append(cell(line))
                sources[line["index"]] = source(line)
    kinds = {
        index: (*cells, sources[index])
        for index, cells in judged.items()
        if len(cells) == len(files) and not (only_different and len(set(cells)) == 1)
    }
    chosen = dict.fromkeys(varied(kinds, most), None)
    responses: dict[int, dict[str, Line]] = {index: {} for index in chosen}
    for name, path in files.items():
        for line in each_line(path):
            if line["index"] in responses:
                responses[line["index"]].setdefault(name, line)
    return [Question(origin, found, images) for found in responses.values()]


def held_out_questions(
    run_dir: Path, config: Mapping[str, Any], names: list[str]
) -> list[Question]:
    """Select questions of held-out sets, with the responses of the first and last evaluation."""
    files: dict[str, dict[str, Path]] = {}
    for name in names:
        first, last = first_evaluation(run_dir, name), run_dir / "eval" / f"{name}.jsonl"
        of_set = {} if first is None else {f"step {first[0]}": first[1]}
        if last.exists():
            of_set["last evaluation" if of_set else "response"] = last
        if of_set:
            files[name] = of_set
    folders, found = held_out_folders(config), list[Question]()
    each = max(NUM_HELD_OUT // max(len(files), 1), MIN_OF_SET)
    for name, of_set in files.items():
        found += compared(name, of_set, images_in(folders.get(name, "")), each)
    return found


def first_evaluation(run_dir: Path, name: str) -> tuple[int, Path] | None:
    """Return step and file of a set's first evaluation during training, if there was one."""
    return min(_numbered(run_dir / "eval", f"{name}_step_"), default=None)


def rollout_questions(run_dir: Path, config: Mapping[str, Any]) -> list[Question]:
    """Select prompts of the last and of the first training step with saved rollouts."""
    steps = sorted(_numbered(run_dir / "rollouts", "step_"))
    images = images_in(*training_folders(config)) if steps else None
    found = []
    for place, most in NUM_PROMPTS.items():
        if len(steps) > (place == 0):
            step, path = steps[place]
            found += _of_step(f"training, step {step}", path, images, most)
    return found


def rollout_lines(path: Path) -> Lines:
    """Read a rollout file; its lines have the verdicts beside the texts, as evaluations have."""
    return [{**line.get("reward", {}), **line} for line in read_lines(path)]


def last_rollouts(run_dir: Path) -> tuple[int, Lines]:
    """Return the last step with saved rollouts, and their lines; 0 without any."""
    step, path = max(_numbered(run_dir / "rollouts", "step_"), default=(0, None))
    return step, [] if path is None else rollout_lines(path)


def _of_step(origin: str, path: Path, images: Images | None, most: int) -> list[Question]:
    prompts: dict[int, Lines] = {}
    for line in rollout_lines(path):
        prompts.setdefault(line["index"], []).append(line)
    shown = {index: _typical(lines) for index, lines in prompts.items()}
    kinds = {i: (*sorted({cell(one) for one in o}), source(o[0])) for i, o in shown.items()}
    found = []
    for index in varied(kinds, most):
        named = {f"sample {o['sample']}, advantage {o['advantage']:+.2f}": o for o in shown[index]}
        note = f"{len(named)} of {len(prompts[index])} samples"
        found.append(Question(origin, named, images, note))
    return found


def _typical(lines: Lines) -> Lines:
    """Return the best response of each cell, or the best and the worst if there is one cell."""
    ordered = sorted(lines, key=lambda line: -line["advantage"])
    found = {cell(line): line for line in reversed(ordered)}
    if len(found) > 1 or len(ordered) == 1:
        return sorted(found.values(), key=lambda line: -line["advantage"])
    return [ordered[0], ordered[-1]]


def _numbered(directory: Path, prefix: str) -> list[tuple[int, Path]]:
    """Return the files `PREFIXn.jsonl` of a directory with their numbers."""
    pattern = re.compile(re.escape(prefix) + r"(\d+)\.jsonl")
    paths = directory.iterdir() if directory.is_dir() else ()
    return [(int(m[1]), path) for path in paths if (m := pattern.fullmatch(path.name))]
