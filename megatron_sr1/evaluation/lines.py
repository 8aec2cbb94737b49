"""The files of an evaluation, `eval/NAME.jsonl`: a line per response, and the file as it grows.

docs/evaluation.md describes the format. Lines are read one at a time: of a set of any size only the
verdicts are kept.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from megatron_sr1.records import RIGHT_FROM, Example, Reward, Rollout, texts
from megatron_sr1.rewards.agreement import JUDGED
from megatron_sr1.rewards.score import VERDICTS, is_exact
from megatron_sr1.rollout.text_stats import TextStats
from megatron_sr1.runtime.files import replacing

Line = dict[str, Any]
TEXT_STATS = tuple(each.name for each in fields(TextStats))
KEPT = ("index", "sample", "answer", "source", *VERDICTS, *JUDGED, *TEXT_STATS)
"""What results need of a line, besides its category."""
SOURCES = ("data_source", "source")
"""Columns of a data set that name where a sample comes from."""


def evaluation_line(
    rollout: Rollout,
    reward: Reward,
    example: Example,
    prompt: str,
    stats: TextStats | None = None,
) -> Line:
    """Return a line of an evaluation file: the texts, and the verdicts with their reasons.

    A verdict is 0, 1 or null. Accuracy and self-reward are what the user's reward function gave, if
    there is one. `prompt` is the rendered text of pass 1; `stats` are absent for responses made
    elsewhere, whose tokens are not known.
    """
    expected = example.metadata.get("expected_description", example.metadata.get("digits"))
    exact = None if expected is None else int(is_exact(rollout.description or "", expected))
    shortcut = None
    if reward.self_reward is not None:
        shortcut = int(reward.accuracy >= RIGHT_FROM > reward.self_reward)
    sources = (example.metadata[name] for name in SOURCES if name in example.metadata)
    return {
        "index": rollout.index,
        "sample": rollout.sample,
        "source": next(sources, None),
        "metadata": dict(example.metadata),
        "prompt": prompt,
        **texts(rollout, example),
        "answer": reward.answer,
        "accuracy": _short(reward.accuracy),
        "because": reward.because,
        "reading_answer": reward.reading_answer,
        "self_reward": _short(reward.self_reward),
        "reading_because": reward.reading_because,
        "description_exact": exact,
        "shortcut": shortcut,
        **(vars(stats) if stats is not None else {}),
    }


def verdicts_of(line: Mapping[str, Any], category: str = "category") -> Line:
    """Return what results need of a line, without its texts.

    `category` names the column of the data set, or of the line itself, that divides the set.
    """
    kept = {name: line.get(name) for name in KEPT}
    metadata = line.get("metadata") or {}
    return {**kept, "category": metadata.get(category, line.get(category))}


def _short(verdict: float | None) -> float | None:
    """Convert 0.0 and 1.0 to int, for the file."""
    return int(verdict) if verdict in (0.0, 1.0) else verdict


class LinesFile:
    """The file of an evaluation while it grows: `NAME.jsonl.partial`, renamed when it is whole.

    Attributes:
        verdicts: of its lines, as `verdicts_of` returns them.
    """

    def __init__(self, target: Path, is_writer: bool = True, resume_with: int = 0) -> None:
        """Start the file, or continue one with `resume_with` responses to each question.

        Only the writer touches it. What a kill truncated is removed: a line, and the other
        responses to the same question.
        """
        self._target, self._is_writer = target, is_writer
        self._partial = target.with_name(f"{target.name}.partial")
        self.verdicts: list[Line] = []
        if not is_writer:
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        if resume_with and target.exists():
            target.rename(self._partial)
        self._partial.touch()
        os.truncate(self._partial, self._read_questions(resume_with) if resume_with else 0)

    def _read_questions(self, num_responses: int) -> int:
        """Read the verdicts of the questions with all responses; return where they end, bytes."""
        end = 0
        with self._partial.open("rb") as file:
            while lines := list(itertools.islice(file, num_responses)):
                if len(lines) < num_responses or not lines[-1].endswith(b"\n"):
                    break
                self.verdicts += [verdicts_of(json.loads(line)) for line in lines]
                end += sum(map(len, lines))
        return end

    def append(self, lines: Sequence[Line]) -> None:
        """Add the lines of whole questions."""
        self.verdicts += map(verdicts_of, lines)
        if self._is_writer:
            with self._partial.open("a", encoding="utf-8") as file:
                file.write(_text(lines))

    def rewrite(self, change: Callable[[list[Line]], list[Line]], num_lines: int) -> Iterator[int]:
        """Replace the lines by changed ones; only on the writer.

        Yields after each `num_lines` how many are done. Unless it is exhausted, all lines stay.
        """
        verdicts: list[Line] = []
        with replacing(self._partial) as changed:
            with self._partial.open("rb") as old, changed.open("wb") as new:
                while chunk := list(itertools.islice(old, num_lines)):
                    lines = change([json.loads(line) for line in chunk])
                    new.write(_text(lines).encode())
                    verdicts += map(verdicts_of, lines)
                    yield len(verdicts)
        self.verdicts = verdicts

    def close(self) -> None:
        """Give the file its name."""
        if self._is_writer:
            self._partial.replace(self._target)


def _text(lines: Sequence[Line]) -> str:
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
