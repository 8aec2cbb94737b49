"""Grades responses that were made elsewhere, without an engine, torch or ranks.

In: jsonl files, each a set under the file's name; docs/evaluation.md describes their lines. Out: the
files of an evaluation, as if this package had made the responses.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_sr1.config.loading import NAME
from megatron_sr1.config.run import Config
from megatron_sr1.data.examples import gold_answers
from megatron_sr1.data.guards import MAX_JSON_BYTES, located, parse_json, shown
from megatron_sr1.errors import ConfigError, DataError, GradingLimit
from megatron_sr1.evaluation.lines import SOURCES, Line, LinesFile, evaluation_line
from megatron_sr1.evaluation.results import set_rates
from megatron_sr1.evaluation.scorers import evaluation_scorer
from megatron_sr1.records import Completion, Example, Message, Reading, Rollout
from megatron_sr1.rewards.response import find_description
from megatron_sr1.rewards.score import Scorer
from megatron_sr1.runtime.files import write_text

log = logging.getLogger(__name__)
GOLDS = ("ground_truth", "gold")
READINGS = ("pass2", "reading")
EXPECTED = (
    'expected {"prompt": text, "response": text, "ground_truth": text or a list of texts}, and '
    "optionally question, pass2, description, data_source, category, metadata, index, sample"
)
NUM_BETWEEN_LOGS = 1000
Response = tuple[Rollout, Example, str]
"""A line's response, its question, and the prompt."""


def grade_files(config: Config, files: Sequence[Path]) -> dict[str, dict[str, float]]:
    """Grade each file into `eval/NAME.jsonl` of the run directory, NAME being the file's.

    Returns:
        rates by set, with the numbers of questions `ungraded` and of lines `skipped`.

    Raises:
        ConfigError: a file cannot be a set.
        DataError: a file cannot be read, or has more than `data.max_skipped` unusable lines.
        GradingError: the grader or the user's function is broken, or a gold answer.
    """
    run_dir = Path(config.output)
    for name in (names := [path.stem for path in files]):
        if not NAME.fullmatch(name) or names.count(name) > 1:
            raise ConfigError(
                f"--from: {name!r} is the name of {names.count(name)} files; expected a name of "
                "its own of letters, digits, _ and - for each, as its set is named after it"
            )
    (run_dir / "eval").mkdir(parents=True, exist_ok=True)
    write_text(run_dir / "config.json", json.dumps(asdict(config), indent=2) + "\n")
    found = {}
    for name, path in zip(names, files, strict=True):
        with evaluation_scorer(config, name) as scorer:
            limit = config.data.max_skipped
            found[name] = _grade_file(path, run_dir / f"eval/{name}.jsonl", scorer, limit)
    return found


def _grade_file(path: Path, target: Path, scorer: Scorer, max_skipped: int) -> dict[str, float]:
    written, ungraded, skipped = LinesFile(target), 0, 0
    for number, response in enumerate(responses(path), 1):
        if isinstance(response, DataError):
            skipped += 1
            log.warning("skipped: %s", response)
            if skipped > max_skipped:
                raise DataError(
                    f"{path}: {skipped} lines skipped, at most {max_skipped} (data.max_skipped); "
                    "the warnings above name them"
                )
            continue
        rollout, example, prompt = response
        try:
            reward = scorer.score(example.where, rollout, example)
        except GradingLimit as error:
            ungraded += 1
            log.warning("left out: %s", error)
            continue
        written.append([evaluation_line(rollout, reward, example, prompt)])
        if number % NUM_BETWEEN_LOGS == 0:
            log.info("%s: %d lines", path, number)
    if not written.verdicts:
        raise DataError(f"{path}: no line could be graded; {EXPECTED}")
    written.close()
    return {**set_rates(written.verdicts), "ungraded": ungraded, "skipped": skipped}


def responses(path: Path) -> Iterator[Response | DataError]:
    """Yield the response of each line, or why it cannot be used."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise DataError(f"--from {path}: {error.strerror}") from None
    with file:
        number = 0
        while data := file.readline(MAX_JSON_BYTES + 1):
            number += 1
            try:
                with located(f"{path} line {number}"):
                    if len(data) > MAX_JSON_BYTES:
                        raise DataError(f"more than {MAX_JSON_BYTES} bytes")
                    if data.strip():
                        yield _response(parse_json(data), number - 1, path)
            except DataError as error:
                yield error


def _response(line: Any, place: int, path: Path) -> Response:
    """Read a line; `place` is its number from 0, and its question's if the line has no index."""
    if not isinstance(line, dict):
        raise DataError(f"a {type(line).__name__}; {EXPECTED}")
    golds = gold_answers(_first(line, GOLDS))
    if not golds:
        raise DataError(f"no ground_truth; {EXPECTED}")
    response, prompt = (_text(line, name) for name in ("response", "prompt"))
    if response is None:
        raise DataError(f"no response; {EXPECTED}")
    reading, description = (_text(line, name) for name in (_named(line, READINGS), "description"))
    if description is None:
        description = find_description(response)
    index, sample = (_count(line, n, d) for n, d in (("index", place), ("sample", 0)))
    metadata = line.get("metadata") or {}
    if not isinstance(metadata, dict):
        raise DataError(f"metadata is {shown(metadata)}; expected an object")
    own = {n: line[n] for n in (*SOURCES, "category") if line.get(n) is not None}
    # A null reading of a line of ours is a missing description if the line has a self-reward.
    has_pass2 = reading is not None or line.get("self_reward") is not None
    question = _text(line, "question") or prompt or ""
    others = line.get("other_golds") or ()
    example = Example(
        index=index,
        key=f"line {place + 1}",
        shard=str(path),
        messages=(Message("user", question),),
        answer=golds[0],
        num_images=int(has_pass2),
        metadata={**metadata, **own},
        other_answers=(*golds[1:], *gold_answers(list(others))),
    )
    read = None if reading is None else Reading((_completion(reading),))
    rollout = Rollout(index, sample, (), _completion(response), description, read, 0)
    return rollout, example, prompt or ""


def _completion(text: str) -> Completion:
    return Completion((), (), text, "stop")


def _named(line: Mapping[str, Any], names: Sequence[str]) -> str:
    """Return the name that a line uses for a value, by default the first."""
    return next((name for name in names if line.get(name) is not None), names[0])


def _first(line: Mapping[str, Any], names: Sequence[str]) -> Any:
    return line.get(_named(line, names))


def _text(line: Mapping[str, Any], name: str) -> str | None:
    value = line.get(name)
    if value is None or isinstance(value, str):
        return value
    raise DataError(f"{name} is {shown(value)}; expected a text")


def _count(line: Mapping[str, Any], name: str, default: int) -> int:
    value = line.get(name, default)
    if type(value) is int and value >= 0:
        return value
    raise DataError(f"{name} is {shown(value)}; expected a whole number from 0")
