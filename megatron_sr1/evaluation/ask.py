"""Ask a model about images of one's own: both passes of an evaluation, without a gold answer.

In: a model, image files and a question. Out: for each response its description, thoughts and
answer, and the answer that the model reads from its description alone. Where the model belongs to a
run, prompts, pixels, marks and lengths are those of the run's configuration. A question becomes a
data set of one sample, so it takes the same way as a question of an evaluation.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.table import Table
from rich.text import Text

from megatron_sr1.config.run import Config
from megatron_sr1.data.examples import Record
from megatron_sr1.data.guards import MAX_IMAGE_BYTES, located, read_file
from megatron_sr1.data.images import image_info
from megatron_sr1.data.processor import Processor
from megatron_sr1.data.shards import write_shards
from megatron_sr1.errors import DataError
from megatron_sr1.records import Message, Rollout
from megatron_sr1.rewards.response import find_answer, find_span, marks_of
from megatron_sr1.rollout.engine import Engine
from megatron_sr1.rollout.readings import RolloutHooks
from megatron_sr1.rollout.two_pass import roll_out
from megatron_sr1.runtime.chat import ChatClient
from megatron_sr1.runtime.groups import Groups
from megatron_sr1.runtime.rng import request_seed
from megatron_sr1.trainer.samples import Samples, make_processor
from megatron_sr1.trainer.sync import start_engine


@dataclass(frozen=True)
class Answered:
    """A response and its reading.

    Attributes:
        response: all that the model wrote.
        description, thoughts, answer: its spans; None without one.
        is_truncated: the token limit cut it.
        reading: what pass 2 wrote; None without a closed description.
        reading_answer: the answer in it; None without one.
    """

    response: str
    description: str | None
    thoughts: str | None
    answer: str | None
    is_truncated: bool
    reading: str | None
    reading_answer: str | None


def read_images(paths: Sequence[Path]) -> tuple[bytes, ...]:
    """Read image files; a DataError names the one that is missing or does not decode."""
    found = []
    for path in paths:
        with located(f"--image {path}"):
            found.append(read_file(path, MAX_IMAGE_BYTES))
            image_info(found[-1])
    return tuple(found)


def open_session(config: Config, groups: Groups) -> Session:
    """Load the model into an engine; `config` is that of `ask_config`."""
    processor = make_processor(config)
    return Session(config, processor, start_engine(config, groups, processor))


class Session:
    """A model that answers questions about images."""

    def __init__(self, config: Config, processor: Processor, engine: Engine) -> None:
        """Ask an engine with the model's weights; `config` is that of `ask_config`."""
        self._config, self._marks = config, marks_of(config.reward.spans)
        self._processor, self._engine = processor, engine
        self._sets = (Path(config.output) / f"question_{n}" for n in itertools.count(1))
        endpoint = config.endpoints().get("rollout.endpoint")
        self._reader = None if endpoint is None else ChatClient("rollout.endpoint", endpoint)

    def ask(self, question: str, images: Sequence[bytes]) -> list[Answered]:
        """Return the responses to a question; the same one gets the same responses.

        The images are placed at the question's `<image>` marks, or in front of it without any.

        Raises:
            DataError: the question has another number of marks, or is too long with its images.
            EngineError: prompt and responses exceed the engine's length.
        """
        config, shards = self._config, next(self._sets)
        # No answer is graded: the gold one only makes the sample a question.
        write_shards([Record((Message("user", question),), "?", tuple(images))], shards)
        samples = Samples(config, str(shards), self._processor)
        try:
            prompt = samples.prompt(0)
        except DataError as error:  # the sample is the question
            raise DataError(
                re.sub(rf"{re.escape(str(shards))}\S* sample \d+: ", "", str(error))
            ) from None
        if self._reader is not None:
            self._reader.begin(config.launch.phase_deadline_seconds)
        hooks = RolloutHooks(
            samples.find_description,
            samples.reading_prompts if config.reward.recipe != "vision_r1" else None,
            partial(request_seed, config.seed, -1),
            reading_messages=samples.reading_messages,
            reader=self._reader,
        )
        found, _ = roll_out(self._engine, [prompt], config.rollout, hooks)
        return [self._answered(each) for each in found]

    def _answered(self, rollout: Rollout) -> Answered:
        text, reading = rollout.completion.text, rollout.reading
        thoughts = find_span(text, self._marks.think)
        said = None if reading is None else (reading.failure or "\n".join(reading.texts))
        return Answered(
            response=text,
            description=rollout.description,
            thoughts=None if thoughts is None else thoughts.content.strip(),
            answer=find_answer(text, self._marks),
            is_truncated=rollout.completion.finish_reason == "length",
            reading=said,
            reading_answer=find_answer(said, self._marks) if said else None,
        )


def answer_table(answered: Answered) -> Table:
    """Return a response for the terminal; what the model wrote stays text."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for label, text in _rows(answered):
        shown = "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)
        table.add_row(label, Text(shown))
    return table


def _rows(answered: Answered) -> Iterator[tuple[str, str]]:
    spans = (answered.description, answered.thoughts, answered.answer)
    if None in spans:  # then the spans do not say all that it wrote
        yield "response", answered.response
    for label, text in zip(("description", "thoughts", "answer"), spans, strict=True):
        yield label, "(none)" if text is None else text
    if answered.is_truncated:
        yield "", "(cut by rollout.max_response_tokens)"
    if answered.reading is None:
        yield "reading", "(none: it takes a closed description)"
    elif answered.reading_answer is None:
        yield "reading", f"(no answer) {answered.reading}"
    else:
        yield "reading", answered.reading_answer
