"""Grades responses that were made elsewhere, without an engine, torch or ranks.

In: jsonl files, each a set under the file's name (docs/evaluation.md describes their lines). Out:
the files of an evaluation, as if this package had made the responses.
"""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeGuard

from megatron_sr1.config.loading import NAME
from megatron_sr1.config.run import Config
from megatron_sr1.data.examples import gold_answers
from megatron_sr1.data.guards import located, parse_json, shown
from megatron_sr1.data.prompts import strip_image_marks
from megatron_sr1.data.shards import ShardReader
from megatron_sr1.data.sources import jsonl_rows
from megatron_sr1.errors import ConfigError, DataError, GradingLimit
from megatron_sr1.evaluation.judge import Judge, opened_judge
from megatron_sr1.evaluation.lines import SOURCES, Line, LinesFile, evaluation_line
from megatron_sr1.evaluation.results import set_rates
from megatron_sr1.evaluation.scorers import evaluation_scorers
from megatron_sr1.records import Completion, Example, Message, Reading, Rollout
from megatron_sr1.rewards.answered import Finished
from megatron_sr1.rewards.grading_pool import GradingPool
from megatron_sr1.rewards.response import DEFAULT_MARKS, Marks, find_description, marks_of
from megatron_sr1.runtime.files import write_text

log = logging.getLogger(__name__)
GOLDS = ("ground_truth", "gold", "gold_answer")
INDICES = ("dataset_index", "index")
"""Number of a line's question in the shards of its set; their gold answer is for lines without."""
READINGS = ("pass2", "reading")
EXPECTED = (
    'expected {"prompt": text, "response": text, "ground_truth": text or a list of texts}, and '
    "optionally question, pass2, description, data_source, category, metadata, index, sample"
)
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
    with evaluation_scorers(config, names) as scorers, opened_judge(config) as judge:
        return {
            name: _Grading(config, path, run_dir / f"eval/{name}.jsonl", scorers[name]).run(judge)
            for name, path in zip(names, files, strict=True)
        }


class _Grading:
    """The grading of one file, in chunks; counts the lines that are left out."""

    def __init__(self, config: Config, path: Path, target: Path, grading: GradingPool) -> None:
        self._config, self._path, self._grading = config, path, grading
        self._written = LinesFile(target)
        self._skipped = self._ungraded = 0

    def run(self, judge: Judge | None) -> dict[str, float]:
        """Grade all lines, and ask the judge about them; return the rates and counts."""
        marks = marks_of(self._config.reward.spans)
        own = self._config.evaluation.sets.get(self._path.stem)
        shards = ShardReader(own.path) if own is not None and Path(own.path).is_dir() else None
        read, done = responses(self._path, marks, shards), 0
        while chunk := list(itertools.islice(read, self._config.evaluation.chunk_prompts)):
            self._written.append(self._graded([each for each in chunk if self._is_usable(each)]))
            done += len(chunk)
            log.info("%s: %d lines", self._path, done)
        if not self._written.verdicts:
            raise DataError(f"{self._path}: no line could be graded; {EXPECTED}")
        if judge is not None:
            for done in self._written.rewrite(judge.judge, self._config.evaluation.chunk_prompts):
                log.info("%s: %d lines judged", self._path, done)
        self._written.close()
        counts = {"ungraded": self._ungraded, "skipped": self._skipped}
        return {**set_rates(self._written.verdicts), **counts}

    def _is_usable(self, response: Response | DataError) -> TypeGuard[Response]:
        """Return False for a line that cannot be used, which is counted."""
        if not isinstance(response, DataError):
            return True
        self._skipped += 1
        log.warning("skipped: %s", response)
        limit = self._config.data.max_skipped
        if self._skipped > limit:
            raise DataError(
                f"{self._path}: {self._skipped} lines skipped, at most {limit} "
                f"(data.max_skipped); the last one: {response}"
            )
        return False

    def _graded(self, found: Sequence[Response]) -> list[Line]:
        """Return the lines of responses, but of those that met a limit, which are counted."""
        finished = [  # each by itself: what lines say of their prompts may differ
            Finished(example.where, replace(rollout, index=number), example)
            for number, (rollout, example, _) in enumerate(found)
        ]
        lines = []
        rewards = self._grading.results(finished)
        for (rollout, example, prompt), reward in zip(found, rewards, strict=True):
            if isinstance(reward, GradingLimit):
                self._ungraded += 1
                log.warning("left out: %s", reward)
            else:
                lines.append(evaluation_line(rollout, reward, example, prompt))
        return lines


def responses(
    path: Path, marks: Marks = DEFAULT_MARKS, shards: ShardReader | None = None
) -> Iterator[Response | DataError]:
    """Yield the response of each line, or why it cannot be used."""
    if not path.is_file():
        raise DataError(f"--from {path}: no such file; expected a file of json lines")
    for place, (where, line) in enumerate(jsonl_rows(path)):
        try:
            with located(str(path.with_name(where))):
                if isinstance(line, DataError):
                    raise line
                key = where.removeprefix(f"{path.name} ")
                value = _completed(parse_json(line), shards)
                yield _response(value, place, path, key, marks)
        except DataError as error:
            yield error


def _completed(line: Any, shards: ShardReader | None) -> Any:
    """Return a line that names no gold answer with that, and the question, of the set's shards."""
    number = _named(line, INDICES) if isinstance(line, dict) else ""
    if shards is None or line.get(number) is None or _first(line, GOLDS) is not None:
        return line
    index = _count(line, number, 0)
    if index >= len(shards):
        raise DataError(f"{number} is {index}; the shards of the set have {len(shards)} samples")
    example = shards.example(index)
    if _letters(strip_image_marks(example.question)) not in _letters(_text(line, "prompt") or ""):
        raise DataError(
            f"the prompt does not ask what {example.where} asks, which {number} names; make the "
            "shards from the same rows, with none skipped"
        )
    found = {"question": example.question, "metadata": dict(example.metadata), "index": index}
    return {**found, **line, "ground_truth": list(example.golds)}


def _letters(text: str) -> str:
    return "".join(filter(str.isalnum, text))


def _response(line: Any, place: int, path: Path, key: str, marks: Marks) -> Response:
    """Read a line; `place`, from 0, is the number of its question if the line has no index."""
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
        description = find_description(response, marks)
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
        key=key,
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
