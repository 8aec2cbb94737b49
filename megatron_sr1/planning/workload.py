"""What a step has to do: how many sequences, of which lengths. A configuration gives limits only.

In: a configuration and, where the user knows better, mean lengths. Out: a `Workload`, which the
plan prints, as every time depends on it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_sr1.config import Config
from megatron_sr1.model.hf_config import HFConfig

PROMPT_TEXT_TOKENS = 250
"""Assumption: instructions and question."""
SHARE_OF_LIMIT = 0.5
"""Assumption: a mean response or reading is half of its limit."""
DESCRIPTION_SHARE = 0.5
"""Assumption: the description is the first half of a response."""


@dataclass(frozen=True)
class Workload:
    """A step's sequences, by their means.

    Attributes:
        num_prompts: a step; in SFT sequences.
        samples_per_prompt: responses of each.
        num_updates: optimizer updates a step.
        text_tokens: of a prompt, without images.
        image_tokens: of a prompt, merged.
        patches_per_token: of an image.
        response_tokens: of pass 1; in SFT of the target.
        reading_tokens: of pass 2; 0 where there is none.
        most_response_tokens: limit of pass 1.
        most_reading_tokens: limit of pass 2.
        has_reference: whether a KL term needs the reference's logprobs.
        is_forked: pass 2 starts as soon as a description closes.
    """

    num_prompts: int
    samples_per_prompt: int
    num_updates: int
    text_tokens: float
    image_tokens: float
    patches_per_token: int
    response_tokens: float
    reading_tokens: float
    most_response_tokens: int
    most_reading_tokens: int
    has_reference: bool
    is_forked: bool

    @property
    def num_sequences(self) -> int:
        """Of a step."""
        return self.num_prompts * self.samples_per_prompt

    @property
    def image_patches(self) -> float:
        """Of a prompt's image."""
        return self.image_tokens * self.patches_per_token

    @property
    def prompt_tokens(self) -> float:
        """With the image."""
        return self.text_tokens + self.image_tokens

    @property
    def sequence_tokens(self) -> float:
        """Prompt and response."""
        return self.prompt_tokens + self.response_tokens

    @property
    def step_tokens(self) -> float:
        """That a step trains on, prompts included."""
        return self.num_sequences * self.sequence_tokens

    @property
    def reading_prompt_tokens(self) -> float:
        """Of pass 2: instructions, question and the description."""
        return self.text_tokens + DESCRIPTION_SHARE * self.response_tokens

    def __str__(self) -> str:
        """In a line."""
        text = f"{self.num_prompts} x {self.samples_per_prompt} sequences of {self.text_tokens:.0f}"
        text += f" text + {self.image_tokens:.0f} image + {self.response_tokens:.0f} response"
        reading = f", {self.reading_tokens:.0f} read" if self.reading_tokens else ""
        return f"{text} tokens{reading}, {self.num_updates} updates"


def workload(
    config: Config,
    hf_config: HFConfig,
    *,
    text_tokens: float | None = None,
    image_tokens: float | None = None,
    response_tokens: float | None = None,
    reading_tokens: float | None = None,
) -> Workload:
    """A step under a configuration; lengths that are None are assumed.

    Args:
        config: of the run.
        hf_config: gives the pixels of a token.
        text_tokens: mean of a prompt's text.
        image_tokens: mean of a prompt's image; assumed: of the middle of the pixel limits.
        response_tokens: mean of pass 1.
        reading_tokens: mean of pass 2.
    """
    data, rollout = config.data, config.rollout
    is_sft = config.stage == "sft"
    if image_tokens is None:
        middle = math.sqrt(data.min_pixels * data.max_pixels)
        image_tokens = middle / pixels_per_token(hf_config)
    if response_tokens is None:
        response_tokens = SHARE_OF_LIMIT * rollout.max_response_tokens
    if reading_tokens is None:
        reading_tokens = SHARE_OF_LIMIT * rollout.max_reading_tokens
    has_reading = not is_sft and config.reward.recipe == "vision_sr1"
    return Workload(
        num_prompts=data.prompts_per_step,
        samples_per_prompt=1 if is_sft else rollout.samples_per_prompt,
        num_updates=1 if is_sft else data.prompts_per_step // config.algorithm.prompts_per_update,
        text_tokens=PROMPT_TEXT_TOKENS if text_tokens is None else text_tokens,
        image_tokens=image_tokens,
        patches_per_token=hf_config.vision.spatial_merge_size**2,
        response_tokens=response_tokens,
        reading_tokens=reading_tokens if has_reading else 0.0,
        most_response_tokens=rollout.max_response_tokens,
        most_reading_tokens=rollout.max_reading_tokens,
        has_reference=not is_sft and config.algorithm.kl_coefficient > 0,
        is_forked=rollout.pass2 == "fork",
    )


def pixels_per_token(hf_config: HFConfig) -> int:
    """Area of an image that becomes one merged token."""
    return (hf_config.vision.patch_size * hf_config.vision.spatial_merge_size) ** 2


def row_tokens(config: Config) -> int:
    """Longest row of a micro-batch: the budget, or the longest sequence that is let in."""
    longest = config.data.max_prompt_tokens
    if config.stage != "sft":
        longest += config.rollout.max_response_tokens
    return max(config.data.row_budget, longest)
