"""A dataset's samples by index, as prompts, training samples, pixels and packed micro-batches.

Images do not travel between ranks: each rank reads the pixels that it needs from the shard. What it
has read is kept until `forget`, pixels until `forget_pixels`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import cached_property, partial
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megatron_sr1.checkpoint.folders import resolve_model
from megatron_sr1.config.run import Config
from megatron_sr1.data.guards import located
from megatron_sr1.data.packing import Size, pack_samples, plan_ranks
from megatron_sr1.data.pixels import PixelReader
from megatron_sr1.data.processor import Processor
from megatron_sr1.data.prompts import Prompts, with_system_turn
from megatron_sr1.data.sandbox import run_limited
from megatron_sr1.data.shards import ShardReader
from megatron_sr1.errors import ConfigError, DataError
from megatron_sr1.model.flops import patch_cost
from megatron_sr1.model.hf_config import read_hf_config
from megatron_sr1.model.row_split import sequence_multiple
from megatron_sr1.model.transformer_config import row_multiple
from megatron_sr1.records import (
    Example,
    PackedBatch,
    Prompt,
    Rollout,
    TrainSample,
    VisionInputs,
)
from megatron_sr1.rewards.answers import question_options
from megatron_sr1.rewards.response import (
    DEFAULT_MARKS,
    Marks,
    bare_gold,
    description_span,
    find_description,
    marks_of,
)
from megatron_sr1.runtime.groups import Groups

if TYPE_CHECKING:
    from PIL import Image


def make_processor(config: Config, hf_files: Path | None = None) -> Processor:
    """Load the tokenizer and image processor of `model.path`, or those of `hf_files`."""
    data, directory = config.data, hf_files or resolve_model(*config.model.at).hf_files
    dtype = config.model.dtype
    return Processor(directory, data.min_pixels, data.max_pixels, data.chat_template, dtype)


class Samples:
    """Samples of one or more directories of shards, with one index space.

    Attributes:
        reader: reads the shards; its `sizes` are the number of samples of each directory.
        find_description: returns the description in a response so far; None while it is open.
        prompts: makes the messages of both passes.
        pixels: reads the images, for engine and trainer alike.
        readings: prompts of pass 2 since `forget`, token ids by example and description.
    """

    def __init__(
        self, config: Config, directories: str | Mapping[str, str], processor: Processor
    ) -> None:
        """Open the shards of a directory, or of several sets by name.

        Raises:
            ConfigError: a directory does not exist, or a prompt's template cannot be used.
        """
        sets = directories if isinstance(directories, Mapping) else {"": directories}
        for directory in sets.values():
            if not directory or not Path(directory).is_dir():
                raise ConfigError(
                    f"data directory {directory!r} does not exist; set data.train or the path of a "
                    "set to a directory of shards (tools/make_shards.py writes them)"
                )
        self.reader = ShardReader(*sets.values())
        self._names, self._ends = list(sets), list(accumulate(self.reader.sizes))
        self._examples: dict[int, Example] = {}
        self.processor = processor
        self.prompts = Prompts(config.data, config.reward.recipe, question_options)
        self._config, self._marks = config, marks_of(config.reward.spans)
        self._shares_prompts = config.shares_prompts
        self.find_description = partial(find_description, marks=self._marks)
        self._prompts: dict[int, Prompt] = {}
        self._encoded: dict[int, tuple[int, ...]] = {}  # by `prepare`, image pads not expanded
        threads = config.data.image_threads
        self.pixels = PixelReader(self.reader, processor, self.example, threads)
        self.readings: dict[tuple[int, str], tuple[int, ...]] = {}
        self._packer = ThreadPoolExecutor(1, "packing")

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.reader)

    def set_of(self, index: int) -> str:
        """Return the name of a sample's set; "" in a single directory."""
        return self._names[bisect_right(self._ends, index)]

    def example(self, index: int) -> Example:
        """Return a sample's text; it is kept."""
        if index not in self._examples:
            self._examples[index] = self.reader.example(index)
        return self._examples[index]

    def prepare(self, indices: Sequence[int]) -> None:
        """Encode the prompts of samples, all at once; `prompt` names the one that is broken."""

        def rendered() -> list[str]:
            asked = [self.prompts.pass1_messages(self.example(index)) for index in indices]
            return self.processor.render(asked)

        with suppress(DataError):
            encoded = self.processor.encode(run_limited(rendered, "pass 1"))
            self._encoded = dict(zip(indices, encoded, strict=True))

    def prompt(self, index: int) -> Prompt:
        """Return the pass-1 prompt of a sample, with its pixels."""
        if index in self._prompts:
            return self._prompts[index]
        example, data = self.example(index), self._config.data
        vision = self.pixels.get(index)  # first, as nothing else takes what was read ahead
        with located(example.where):
            if example.answer is None:
                raise DataError("no gold answer to judge by")
            if index in self._encoded:
                grids = vision.grids if vision else ()
                token_ids = self.processor.expand(self._encoded.pop(index), grids)
                prompt = Prompt(example, token_ids, vision)
            else:
                messages = self.prompts.pass1_messages(example)
                prompt = self.processor.encode_prompt(example, vision, messages)
            if len(prompt.token_ids) > data.max_prompt_tokens:
                raise DataError(
                    f"prompt of {len(prompt.token_ids)} tokens, at most {data.max_prompt_tokens}; "
                    "raise data.max_prompt_tokens or lower data.max_pixels (and data.min_pixels, "
                    "to which images are enlarged)"
                )
        self._prompts[index] = prompt
        return prompt

    def images(self, index: int) -> Sequence[Image.Image]:
        """Decode the RGB images of a sample, to be shown."""
        return self.reader.images(index)

    def vision(self, index: int) -> VisionInputs | None:
        """Return the pixels of a sample's images; None if it has none."""
        return None if index < 0 else self.pixels.get(index)

    def reading_prompts(self, asked: Sequence[tuple[Prompt, str]]) -> list[tuple[int, ...]]:
        """Return the token ids of text-only pass-2 prompts; `readings` keeps them.

        A prompt is asked with a description. Responses to a prompt often share one.
        """
        keys = [(prompt.example.index, text) for prompt, text in asked]
        new = {k: a for k, a in zip(keys, asked, strict=True) if k not in self.readings}
        if new:
            encoded = self.processor.encode(self._rendered(list(new.values())))
            ids = (self.processor.expand(each, ()) for each in encoded)
            self.readings |= zip(new, ids, strict=True)
        return [self.readings[key] for key in keys]

    def _rendered(self, asked: Sequence[tuple[Prompt, str]]) -> list[str]:
        """Render prompts of pass 2, all at once; one by one if that fails, to name the sample."""

        def render(part: Sequence[tuple[Prompt, str]]) -> list[str]:
            messages = [self.prompts.pass2_messages(prompt.example, text) for prompt, text in part]
            return self.processor.render(messages)

        try:
            return run_limited(lambda: render(asked), "pass 2")
        except DataError:
            rendered = []
            for each in asked:
                with located(f"{each[0].example.where}: pass 2"):
                    rendered += render([each])
            return rendered

    def reading_messages(self, prompt: Prompt, description: str) -> tuple[tuple[str, str], ...]:
        """Return the messages of the pass-2 prompt for another model, pairs of role and text."""
        with located(f"{prompt.example.where}: pass 2"):
            messages = self.prompts.pass2_messages(prompt.example, description)
        return tuple((m["role"], "".join(part["text"] for part in m["content"])) for m in messages)

    def gold_answer(self, prompt: Prompt) -> tuple[tuple[int, ...], tuple[int, ...]]:
        r"""Token ids of `\boxed{`, and of the (first) gold answer with its closing brace.

        With other marks of the answer, those; with thoughts first, an empty thought is in front.
        """
        lead, closing = self._marks.answer
        if self._marks.think_first:
            opens, closes = self._marks.think
            opening = "" if self.processor.prompt_ends_with(opens) else f"{opens}\n"
            lead = f"{opening}\n{closes}\n\n{lead}"
        return self.processor.encode_answer(lead, bare_gold(prompt.example.answer or ""), closing)

    def train_sample(self, rollout: Rollout) -> TrainSample:
        """Return a rollout as a sequence whose response is to learn, without advantages."""
        completion, vision = rollout.completion, self.pixels.get(rollout.index)
        num_prompt = len(rollout.prompt_token_ids)
        token_ids = np.array((*rollout.prompt_token_ids, *completion.token_ids), np.int64)
        in_response = np.zeros(len(token_ids), bool)
        engine_logprobs = np.zeros(len(token_ids), np.float32)
        in_response[num_prompt:] = True
        engine_logprobs[num_prompt:] = completion.logprobs
        return TrainSample(
            index=rollout.index,
            num_images=self.example(rollout.index).num_images,
            token_ids=token_ids,
            loss_mask=in_response,
            image_grid_thw=vision.grids if vision else (),
            engine_logprobs=engine_logprobs,
        )

    def advantages(
        self, rollout: Rollout, advantage: float, description_advantage: float | None = None
    ) -> np.ndarray:
        """Return the advantage of each token of a rollout's sequence; a prompt's have 0.

        The description's tokens have `description_advantage`, if it is given.

        Returns:
            [tokens] float32.
        """
        num_prompt, sampled = len(rollout.prompt_token_ids), rollout.completion.token_ids
        advantages = np.zeros(num_prompt + len(sampled), np.float32)
        advantages[num_prompt:] = advantage
        if description_advantage is not None and rollout.description is not None:
            first, end = description_tokens(self.processor.pieces(sampled), self._marks)
            advantages[num_prompt + first : num_prompt + end] = description_advantage
        return advantages

    def size(self, rollout: Rollout, home: int) -> Size:
        """Return the size of a rollout's training sample, without reading its images."""
        num_tokens = len(rollout.prompt_token_ids) + len(rollout.completion.token_ids)
        merged = rollout.prompt_token_ids.count(self.processor.image_pad_id)
        shared = len(rollout.prompt_token_ids) if self._shares_prompts else 0
        return Size(num_tokens, merged * self.processor.merge_size**2, rollout.index, shared, home)

    def conversation(self, index: int) -> TrainSample:
        """Return a conversation as a sequence whose assistant turns are the targets."""
        data = self._config.data
        example = with_system_turn(self.example(index), data.system_prompt)
        vision = self.pixels.get(index)
        grids = vision.grids if vision else ()
        with located(example.where):
            return self.processor.encode_conversation(example, grids, data.max_prompt_tokens)

    def shares(self, sizes: Sequence[Size], num_ranks: int) -> list[list[int]]:
        """Return which samples of an update each data-parallel rank trains on, balanced by cost."""
        return plan_ranks(sizes, num_ranks, self._patch_cost)

    def pack(self, chosen: Sequence[TrainSample], groups: Groups) -> Sequence[PackedBatch]:
        """Pack this rank's samples into micro-batches within the token budget.

        The first is packed now, and a thread packs the others while the actor computes; the pixels
        must stay until the last one is there.
        """
        model, parallel = self._config.model, self._config.parallel
        return pack_samples(
            chosen,
            self._config.data.row_budget,
            self.vision if groups.is_first_stage else None,
            image_pad_id=self.processor.image_pad_id,
            merge_size=self.processor.merge_size,
            patch_cost=self._patch_cost,
            sequence_multiple=sequence_multiple(parallel.context),
            pad_multiple=row_multiple(model, parallel),
            share_prompts=self._shares_prompts,
            later=self._packer,
        )

    def forget(self) -> None:
        """Free what was read, but for what was read ahead; it is not needed again for long."""
        self.forget_pixels()
        self.readings.clear()
        for index in list(self._examples):  # threads may add to it
            if index not in self.pixels.started:
                del self._examples[index]

    def forget_pixels(self) -> None:
        """Free the pixels, and the prompts with them, once the step's samples are packed."""
        self._prompts.clear()
        self.pixels.forget()

    @cached_property
    def _patch_cost(self) -> float:
        """Cost of an image's patch, in text tokens."""
        return patch_cost(read_hf_config(self.processor.model_dir))


def without_targets(sample: TrainSample) -> TrainSample:
    """Return a sample that teaches nothing, for a rank with no other: all ranks take part."""
    return replace(sample, loss_mask=np.zeros_like(sample.loss_mask))


def description_tokens(pieces: Sequence[str], marks: Marks = DEFAULT_MARKS) -> tuple[int, int]:
    """Find the tokens of a response with a character of its description, tags included.

    A tag may share a token with its neighbours (as in `.</`), which then belongs to the
    description. Tags are ASCII, which stays whole in the text of a single token even if the token
    holds parts of other characters; so the pieces may be joined and searched.

    Args:
        pieces: text of each token by itself, special tokens empty.
        marks: those of the response's spans.

    Returns:
        the first token and the one after the last; (0, 0) if there is no closed description.
    """
    span = description_span("".join(pieces), marks)
    if span is None:
        return 0, 0
    ends = np.cumsum([len(piece) for piece in pieces])
    first = int(np.searchsorted(ends, span.start, side="right"))
    last = int(np.searchsorted(ends, span.end, side="left"))
    return first, last + 1
