"""The prompts of a run's first usable sample as text, special tokens visible, for a dry run.

In: a configuration whose model and shards exist. Out: what the model will read, token for token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_sr1.config.run import Config
from megatron_sr1.data.guards import printable
from megatron_sr1.errors import DataError, SR1Error
from megatron_sr1.trainer.data_checks import NUM_READ
from megatron_sr1.trainer.samples import Samples, make_processor

MAX_SHOWN_CHARACTERS = 2000
"""Of each prompt; of a longer one the middle is left out."""
DESCRIPTION = "(the description)"
"""Stands for a description in pass 2."""


def first_prompts(config: Config, sets: Mapping[str, str], hf_files: Path) -> list[str]:
    """Return lines that show the prompts of both passes, or for SFT a conversation.

    They are of the first usable sample of `sets`, directories of shards by name, with the tokenizer
    in `hf_files`; if there is none, a single line has the reason.
    """
    try:
        samples = Samples(config, sets, make_processor(config, hf_files))
        reason = "there are no samples"
        for index in range(min(len(samples), NUM_READ)):
            try:
                return _shown(config, samples, index)
            except DataError as error:
                reason = str(error)
    except SR1Error as error:
        reason = str(error)
    return [f"prompts     not shown: {reason}"]


def _shown(config: Config, samples: Samples, index: int) -> list[str]:
    example = samples.example(index)
    where = f"{Path(example.shard).name} sample {example.key}"
    if config.stage == "sft":
        ids = samples.conversation(index).token_ids.tolist()
        return [f"first       {where}, {len(ids)} tokens", *_lines(samples, ids)]
    prompt = samples.prompt(index)
    images = f", of which {prompt.token_ids.count(samples.processor.image_pad_id)} of images"
    lines = [
        f"pass 1      {where}, {len(prompt.token_ids)} tokens{images if prompt.vision else ''}"
    ]
    lines += _lines(samples, prompt.token_ids)
    if config.reward.recipe != "vision_r1" and prompt.vision:
        (ids,) = samples.reading_prompts([(prompt, DESCRIPTION)])
        lines += [f"pass 2      {len(ids)} tokens with {DESCRIPTION}", *_lines(samples, ids)]
    return lines


def _lines(samples: Samples, ids: Sequence[int]) -> list[str]:
    """Return the text of token ids, bounded, each line indented and without control characters."""
    text = samples.processor.rendered(ids)
    if len(text) > MAX_SHOWN_CHARACTERS:
        half, left_out = MAX_SHOWN_CHARACTERS // 2, len(text) - MAX_SHOWN_CHARACTERS
        text = f"{text[:half]} … {left_out} more characters … {text[-half:]}"
    return [f"    {printable(line, len(line))}" for line in text.rstrip("\n").split("\n")]
