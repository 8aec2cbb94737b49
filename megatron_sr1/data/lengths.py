"""Counts the tokens of a sample's prompt before training, as the trainer would make it.

Pixels are not processed: an image's tokens follow from its size and the limits of `data.min_pixels`
and `data.max_pixels`. Of a question it is the prompt of pass 1, of a conversation all of its turns.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from pathlib import Path

from megatron_sr1.config.loading import load_config
from megatron_sr1.data.examples import Record, example_from_stored, stored
from megatron_sr1.data.processor import Processor
from megatron_sr1.data.prompts import Options, Prompts, with_system_turn
from megatron_sr1.data.tally import Length


@dataclass(frozen=True)
class PromptLength:
    """Returns the length of a record's prompt; can be sent to other processes.

    Attributes:
        model_dir: directory with tokenizer and image processor.
        config: file of the run's configuration; None: the defaults.
        options: returns the options of a question, for templates that write them.
        settings: the settings that lengths depend on, as text; other settings, other lengths.
    """

    model_dir: Path
    config: Path | None = None
    options: Options | None = field(default=None, repr=False)
    settings: str = ""

    def __call__(self, record: Record) -> Length:
        """Count the tokens; raises DataError for a sample that has no prompt."""
        prompts, system_prompt, processor = self.load()
        example = example_from_stored(stored(record), index=0, key="", shard="")
        grids = tuple(processor.grid(image) for image in record.info)
        if example.answer is None:
            example = with_system_turn(example, system_prompt)
            ids = processor.encode_conversation(example, grids).token_ids.tolist()
        else:
            ids = list(processor.encode_text(prompts.pass1_messages(example), grids))
        image = ids.count(processor.image_pad_id)
        return Length(len(ids) - image, image)

    def load(self) -> tuple[Prompts, str, Processor]:
        """Load prompts, system prompt and processor, once; raises an SR1Error."""
        return _load(self)


@functools.cache
def _load(own: PromptLength) -> tuple[Prompts, str, Processor]:
    config = load_config(own.config, [f"model.path={own.model_dir}"])
    data = config.data
    processor = Processor(own.model_dir, data.min_pixels, data.max_pixels, data.chat_template)
    return Prompts(data, config.reward.recipe, own.options), data.system_prompt, processor
