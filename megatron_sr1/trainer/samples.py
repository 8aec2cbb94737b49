"""A dataset's samples by index, as prompts, training samples and pixels.

Images do not travel between ranks: whoever needs pixels asks here, and they are read from the
shard. What was read is kept until `forget`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megatron_sr1.data.packing import Size
from megatron_sr1.data.processor import Processor
from megatron_sr1.data.prompts import pass1_messages, pass2_messages
from megatron_sr1.data.shards import ShardReader
from megatron_sr1.errors import ConfigError, DataError
from megatron_sr1.records import Example, Prompt, Rollout, TrainSample, VisionInputs
from megatron_sr1.rewards.response import bare_gold
from megatron_sr1.trainer.credit import description_tokens

if TYPE_CHECKING:
    from PIL import Image


class Samples:
    """Samples of one folder of shards.

    Args:
        directory: folder of shards.
        processor: tokenizer and image processor.
        recipe: reward recipe, which chooses the instruction.
        style: prompt style.
        pass2_order: whether question or description comes first in pass 2.
        max_prompt_tokens: longer prompts and conversations are a `DataError`.

    Attributes:
        readings: prompts of pass 2 since `forget`, token ids by example and description.

    Raises:
        ConfigError: the folder is not there.
    """

    def __init__(
        self,
        directory: str,
        processor: Processor,
        *,
        recipe: str,
        style: str,
        pass2_order: str,
        max_prompt_tokens: int,
    ) -> None:
        """Open the shards."""
        if not directory or not Path(directory).is_dir():
            raise ConfigError(
                f"data folder {directory!r} is not there; set data.train or data.eval to a folder "
                "of shards (tools/make_shards.py writes them)"
            )
        self.reader = ShardReader(directory)
        self.processor = processor
        self._recipe, self._style, self._limit = recipe, style, max_prompt_tokens
        self._pass2_order = pass2_order
        self._examples: dict[int, Example] = {}
        self._prompts: dict[int, Prompt] = {}
        self._images: dict[int, Sequence[Image.Image]] = {}
        self._pixels: dict[int, VisionInputs] = {}
        self.readings: dict[tuple[int, str], tuple[int, ...]] = {}

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.reader)

    def example(self, index: int) -> Example:
        """Text of a sample."""
        if index not in self._examples:
            self._examples[index] = self.reader.example(index)
        return self._examples[index]

    def prompt(self, index: int) -> Prompt:
        """Pass-1 prompt of a sample, with its images."""
        if index not in self._prompts:
            self._prompts[index] = self._read_prompt(index)
        return self._prompts[index]

    def images(self, index: int) -> Sequence[Image.Image]:
        """Decoded RGB images of a sample."""
        kept = self._prompts.get(index)
        return kept.images if kept else self._images.get(index) or self.reader.images(index)

    def vision(self, index: int) -> VisionInputs | None:
        """Pixels of a sample's images, None if it has none."""
        if index < 0 or not self.example(index).num_images:
            return None
        if index not in self._pixels:
            self._pixels[index] = self._read_pixels(index)
        return self._pixels[index]

    def reading_prompt(self, prompt: Prompt, description: str) -> tuple[int, ...]:
        """Token ids of the text-only pass-2 prompt, noted in `readings`."""
        told = prompt.example.index, description  # samples of a prompt often say the same
        if told not in self.readings:
            question = prompt.example.question
            messages = pass2_messages(question, description, self._style, self._pass2_order)
            self.readings[told] = self.processor.encode_text(messages)
        return self.readings[told]

    def gold_answer(self, prompt: Prompt) -> tuple[tuple[int, ...], tuple[int, ...]]:
        r"""Token ids of `\boxed{`, and of the (first) gold answer with its closing brace."""
        return self.processor.encode_answer("\\boxed{", bare_gold(prompt.example.answer or ""), "}")

    def train_sample(
        self, rollout: Rollout, advantage: float, description_advantage: float | None = None
    ) -> TrainSample:
        """A rollout and its advantages as a sequence to learn from.

        Args:
            rollout: as sampled.
            advantage: of the response's tokens.
            description_advantage: of those that hold the description instead; None: no difference.
        """
        prompt = self.prompt(rollout.index)
        num_prompt, num_response = len(prompt.token_ids), len(rollout.completion.token_ids)
        token_ids = np.array((*prompt.token_ids, *rollout.completion.token_ids), np.int64)
        in_response = np.arange(num_prompt + num_response) >= num_prompt
        advantages = np.where(in_response, np.float32(advantage), np.float32(0))
        if description_advantage is not None and rollout.description is not None:
            first, behind = description_tokens(self.processor.pieces(rollout.completion.token_ids))
            advantages[num_prompt + first : num_prompt + behind] = description_advantage
        engine_logprobs = np.zeros(len(token_ids), np.float32)
        engine_logprobs[num_prompt:] = rollout.completion.logprobs
        return TrainSample(
            index=rollout.index,
            num_images=prompt.example.num_images,
            token_ids=token_ids,
            loss_mask=in_response,
            image_grid_thw=prompt.image_grid_thw,
            advantages=advantages,
            engine_logprobs=engine_logprobs,
        )

    def size(self, rollout: Rollout) -> Size:
        """What a rollout takes to learn from, without its images being read."""
        num_tokens = len(rollout.prompt_token_ids) + len(rollout.completion.token_ids)
        merged = rollout.prompt_token_ids.count(self.processor.image_pad_id)
        return Size(num_tokens, merged * self.processor.merge_size**2, rollout.index)

    def conversation(self, index: int) -> TrainSample:
        """A supervised sample: the conversation, with its assistant turns as targets."""
        example = self.example(index)
        self._images[index] = images = self.reader.images(index)
        return self.processor.encode_conversation(example, images, self._limit)

    def forget(self) -> None:
        """Let go of what was read: after a step it is not asked for again for long."""
        self._examples.clear()
        self._prompts.clear()
        self._images.clear()
        self._pixels.clear()
        self.readings.clear()

    def _read_prompt(self, index: int) -> Prompt:
        example = self.example(index)
        messages = pass1_messages(example, self._recipe, self._style)
        prompt = self.processor.encode_prompt(example, self.reader.images(index), messages)
        if len(prompt.token_ids) > self._limit:
            raise DataError(
                f"{example.shard} sample {example.key}: prompt of {len(prompt.token_ids)} tokens, "
                f"at most {self._limit}; raise data.max_prompt_tokens or lower data.max_pixels "
                "(and data.min_pixels, to which images are enlarged)"
            )
        return prompt

    def _read_pixels(self, index: int) -> VisionInputs:
        pixels = self.processor.vision(self.images(index))
        self._images.pop(index, None)  # the pixels are kept instead
        return pixels
