"""What grading needs of a rollout: its texts and the sample's, as JSON values, without token ids.

In: a rollout and its example. Out: a small record, which travels to the processes that grade.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_sr1.errors import GradingLimit
from megatron_sr1.records import Example, Reading, Rollout

Key = tuple[int, int]
"""Index and number of a rollout."""


@dataclass(frozen=True)
class Finished:
    """A rollout to be graded.

    `name` is for messages; `image_files` reads the sample's images, for a function that takes them.
    """

    name: str
    rollout: Rollout
    example: Example
    image_files: Callable[[], Sequence[bytes]] | None = None

    @property
    def key(self) -> Key:
        """What names the rollout in a step."""
        return self.rollout.key


@dataclass(frozen=True)
class Read:
    """What grading needs of a reading: its sampled texts, or the gold answer's logprobs.

    `num_tokens` has the tokens of each text, None if they are not known.
    """

    texts: Sequence[str]
    num_tokens: Sequence[int | None]
    gold_logprobs: Sequence[float] | None
    failure: str | None


@dataclass(frozen=True)
class Answered:
    """What grading needs of a rollout and its example: JSON values, no token ids.

    Attributes:
        name: of the sample and rollout, for messages.
        index, sample: of the rollout.
        num_tokens: sampled tokens of the response; None if they are not known.
        image_paths: files of the sample's images, for a function that takes them.
    """

    name: str
    index: int
    sample: int
    question: str
    golds: Sequence[str]
    num_images: int
    metadata: Mapping[str, Any]
    response: str
    num_tokens: int | None
    description: str | None
    reading: Read | None
    question_only: Read | None
    image_paths: Sequence[str] = ()


def answered(finished: Finished, image_paths: Sequence[str] = ()) -> Answered:
    """Return what grading needs of a rollout and its example."""
    rollout, example = finished.rollout, finished.example
    return Answered(
        name=finished.name,
        index=rollout.index,
        sample=rollout.sample,
        question=example.question,
        golds=example.golds,
        num_images=example.num_images,
        metadata=example.metadata,
        response=rollout.completion.text,
        num_tokens=len(rollout.completion.token_ids) or None,
        description=rollout.description,
        reading=_read(rollout.reading),
        question_only=_read(rollout.question_only),
        image_paths=image_paths,
    )


def _read(reading: Reading | None) -> Read | None:
    if reading is None:
        return None
    counts = [len(each.token_ids) or None for each in reading.answers]
    return Read(reading.texts, counts, reading.gold_logprobs, reading.failure)


def check_readings(given: Answered) -> None:
    """Raise GradingLimit if an endpoint did not give a reading."""
    for reading in (given.reading, given.question_only):
        if reading is not None and reading.failure is not None:
            raise GradingLimit(f"{given.name}: pass 2 at rollout.endpoint: {reading.failure}")


def texts_of(given: Answered) -> list[tuple[str, int | None]]:
    """Return the texts to judge with their tokens: the response, then what was read from it."""
    found = [(given.response, given.num_tokens)]
    if given.num_images and given.description is not None and given.reading is not None:
        for reading in (given.reading, given.question_only):
            if reading is not None:
                found += zip(reading.texts, reading.num_tokens, strict=False)
    return found
