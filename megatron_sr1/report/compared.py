"""The runs and evaluations that `compare` puts side by side, read from their directories.

In: directories. Out: for each its configuration, metrics and held-out verdicts, and of each
held-out set who answered the same questions; notes say what cannot be compared.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_sr1.errors import ConfigError
from megatron_sr1.observability.metrics import each_line, read_lines
from megatron_sr1.report.curves import with_mean_length
from megatron_sr1.report.facts import read_json
from megatron_sr1.report.results import RESULTS_FILE
from megatron_sr1.report.samples import held_out_folders
from megatron_sr1.report.verdicts import Lines
from megatron_sr1.rewards.score import VERDICTS

Answers = dict[str, Path]
"""Name of a held-out set -> the file of its answers."""
Asked = tuple[str, str]
"""JSON of a question with its gold answer, and of the other columns of the data set."""


@dataclass(frozen=True)
class ComparedRun:
    """A run or an evaluation.

    Attributes:
        name: its directory, as long as needed to tell it from the others.
        config: as in config.json; empty without one.
        metrics: lines of metrics.jsonl.
        answers: files of its held-out answers: the last ones.
        folders: shards of its held-out sets, where they still are.
        notes: what is unfinished.
    """

    name: str
    directory: Path
    config: Mapping[str, Any]
    metrics: Lines
    answers: Answers
    folders: Mapping[str, str]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Compared:
    """Runs to put side by side.

    Attributes:
        runs: two or more.
        judged: held-out set -> name of a run -> its verdicts, for sets that two or more runs
            answered, on the same questions.
        notes: what is unfinished or cannot be compared.
    """

    runs: Sequence[ComparedRun]
    judged: Mapping[str, Mapping[str, Lines]]
    notes: Sequence[str] = field(default_factory=tuple)

    def folder(self, held_out: str) -> str:
        """Return the shards of a held-out set; "" if no run has them any more."""
        found = (run.folders.get(held_out, "") for run in self.runs)
        return next(filter(None, found), "")


def read_runs(directories: Sequence[Path]) -> Compared:
    """Read two or more directories of runs or evaluations.

    Raises:
        ConfigError: there is only one, one twice, or one that is no run.
    """
    resolved = [directory.resolve() for directory in directories]
    twice = {str(d) for d, r in zip(directories, resolved, strict=True) if resolved.count(r) > 1}
    if twice:
        raise ConfigError(f"{', '.join(sorted(twice))}: the same run twice")
    if len(directories) < 2:
        raise ConfigError(f"compare needs two or more runs, got {directories[0]} alone")
    names = _names(resolved)
    runs = [_read_run(*pair) for pair in zip(names, directories, strict=True)]
    notes = [f"{run.name}: {note}" for run in runs for note in run.notes]
    judged: dict[str, Mapping[str, Lines]] = {}
    for held_out in dict.fromkeys(name for run in runs for name in run.answers):
        verdicts, problems = _same_questions(held_out, runs)
        notes += problems
        if len(verdicts) > 1:
            judged[held_out] = verdicts
    if not judged:
        notes.append("no held-out set was answered by two of them: there are no paired differences")
    return Compared(runs, judged, notes)


def _names(directories: Sequence[Path]) -> list[str]:
    """Return the last parts of the paths, as many as tell all of them apart."""
    for parts in range(1, max(len(each.parts) for each in directories)):
        names = ["/".join(each.parts[-parts:]) for each in directories]
        if len(set(names)) == len(names):
            return names
    return [str(each) for each in directories]


def _read_run(name: str, directory: Path) -> ComparedRun:
    config = read_json(directory / "config.json")
    metrics = read_lines(directory / "metrics.jsonl")
    answers, notes = _answers(directory, config)
    if "stage" not in config and not metrics and not answers:
        what = "no such directory" if not directory.is_dir() else "no run"
        raise ConfigError(
            f"{directory}: {what}; expected a directory with config.json, metrics.jsonl or "
            f"{RESULTS_FILE}, written by train, sft or eval"
        )
    done = max((line["step"] for line in metrics), default=0)
    wanted = config.get("optimizer", {}).get("num_steps") or done
    if config.get("stage") != "eval" and done < wanted:
        notes.insert(0, f"unfinished, {done} of {wanted} steps")
    folders = _folders(directory, config)
    return ComparedRun(
        name, directory, config, with_mean_length(metrics, config), answers, folders, tuple(notes)
    )


def _answers(directory: Path, config: Mapping[str, Any]) -> tuple[Answers, list[str]]:
    """Return the files of a run's last held-out answers, and notes on those that are not final.

    The demo keeps the answers of its runs to all questions in its own directory, by the names of
    the runs; the runs themselves answer a part of them.
    """
    results = read_json(directory / RESULTS_FILE).get("sets", {})
    found: Answers = {}
    notes = []
    for name in dict.fromkeys((*config.get("evaluation", {}).get("sets", {}), *results)):
        steps = {
            int(match[1]): path
            for path in (directory / "eval").glob(f"{name}_step_*.jsonl")
            if (match := re.fullmatch(rf"{re.escape(name)}_step_(\d+)", path.stem))
        }
        of_demo = directory.resolve().parent / "eval" / f"{directory.resolve().name}_{name}.jsonl"
        for path in (of_demo, directory / "eval" / f"{name}.jsonl"):
            if path.is_file():
                found[name] = path
                break
        else:
            if steps:
                found[name] = steps[max(steps)]
                notes.append(f"its last answers to {name} are of step {max(steps)}")
    return found, notes


def _folders(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Return the shards of the held-out sets; relative paths also from where the run was started.

    That is known if the run's directory ends as its `output`.
    """
    output, whole = Path(config.get("output", "")), directory.resolve()
    started = Path()
    if (
        not output.is_absolute()
        and output.parts
        and whole.parts[-len(output.parts) :] == (output.parts)
    ):
        started = Path(*whole.parts[: -len(output.parts)])
    found = {}
    for name, folder in held_out_folders(config).items():
        places = [Path(folder), started / folder] if folder else []
        found[name] = next((str(place) for place in places if place.is_dir()), "")
    return found


def _same_questions(
    held_out: str, runs: Sequence[ComparedRun]
) -> tuple[dict[str, Lines], list[str]]:
    """Return the verdicts of the runs on one held-out set, and what cannot be compared.

    A run whose questions of the same number differ from those of the first run is left out.
    """
    found: dict[str, Lines] = {}
    notes = []
    missing = [run.name for run in runs if held_out not in run.answers]
    if missing:
        notes.append(f"held-out set {held_out}: not answered by {', '.join(missing)}")
    asked: dict[int, Asked] = {}
    for run in runs:
        if held_out not in run.answers:
            continue
        rows = list(_verdicts(run.answers[held_out]))
        own = {row["index"]: row["asked"] for row in rows}
        shared = asked.keys() & own.keys()
        if not all(_is_same(asked[index], own[index]) for index in shared):
            notes.append(f"held-out set {held_out}: {run.name} was asked other questions; left out")
        elif asked and not shared:
            notes.append(f"held-out set {held_out}: {run.name} shares no question; left out")
        else:
            if asked and own.keys() != asked.keys():
                notes.append(
                    f"held-out set {held_out}: {run.name} answered {len(own)} questions, the first "
                    f"run {len(asked)}; differences are over the {len(shared)} that both answered"
                )
            asked = asked or own
            found[run.name] = rows
    return found, notes


def _is_same(one: Asked, other: Asked) -> bool:
    """Return True for the same texts and, where both have them, the same columns of the data set.

    Questions about different images may have the same texts. Answers graded from files may lack the
    columns.
    """
    known = "null" not in (one[1], other[1])
    return one[0] == other[0] and (one[1] == other[1] or not known)


def _verdicts(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the verdicts of a file's lines, and what each was `asked`."""
    for line in each_line(path):
        texts = json.dumps([line.get("question"), line.get("gold")])
        asked = texts, json.dumps(line.get("metadata") or None)
        kept = {name: line.get(name) for name in ("index", "source", *VERDICTS)}
        yield {**kept, "asked": asked}
