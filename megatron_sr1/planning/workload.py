"""What is planned: a configured run on a type of GPU, and the sequences of one of its steps.

In: a configuration, a model's shape, a GPU and, where the user knows them, mean lengths. Out: a
`PlannedRun` with its `Workload`. A configuration has limits of lengths only, so lengths that are
not given are assumed; the plan prints them, as every time depends on them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from megatron_sr1.checkpoint.mapping import is_tower_frozen
from megatron_sr1.config.run import Config
from megatron_sr1.model.hf_config import HFConfig
from megatron_sr1.planning.static_memory import DTYPE_BYTES
from megatron_sr1.runtime.gpus import Gpu

PROMPT_TEXT_TOKENS = 250
"""Assumption: mean length of instructions and question."""
SHARE_OF_LIMIT = 0.5
"""Assumption: mean length of a response or reading over its limit."""
DESCRIPTION_SHARE = 0.5
"""Assumption: share of a response that is generated when its description ends."""


@dataclass(frozen=True)
class Workload:
    """The sequences of one step, by their mean lengths.

    Attributes:
        num_prompts: prompts per step; sequences per step in SFT.
        samples_per_prompt: responses to each prompt.
        num_updates: optimizer updates per step.
        text_tokens: length of a prompt without its image.
        image_tokens: merged tokens of a prompt's image.
        patches_per_token: image patches that are merged into one token.
        response_tokens: length of a pass-1 response; in SFT of the target.
        reading_tokens: length of a pass-2 response; 0 without pass 2.
        max_response_tokens: limit of pass 1.
        max_reading_tokens: limit of pass 2.
        has_reference: the KL term needs the reference's logprobs.
        is_forked: pass 2 of a response starts when its description ends, not after pass 1.
    """

    num_prompts: int
    samples_per_prompt: int
    num_updates: int
    text_tokens: float
    image_tokens: float
    patches_per_token: int
    response_tokens: float
    reading_tokens: float
    max_response_tokens: int
    max_reading_tokens: int
    has_reference: bool
    is_forked: bool

    @property
    def num_sequences(self) -> int:
        """Sequences per step."""
        return self.num_prompts * self.samples_per_prompt

    @property
    def image_patches(self) -> float:
        """Patches of a prompt's image."""
        return self.image_tokens * self.patches_per_token

    @property
    def prompt_tokens(self) -> float:
        """Length of a pass-1 prompt with its image."""
        return self.text_tokens + self.image_tokens

    @property
    def sequence_tokens(self) -> float:
        """Length of prompt and response."""
        return self.prompt_tokens + self.response_tokens

    @property
    def step_tokens(self) -> float:
        """Tokens that a step trains on, prompts included."""
        return self.num_sequences * self.sequence_tokens

    @property
    def reading_prompt_tokens(self) -> float:
        """Length of a pass-2 prompt: instructions, question and description."""
        return self.text_tokens + DESCRIPTION_SHARE * self.response_tokens

    def __str__(self) -> str:
        """Summarize in one line."""
        text = f"{self.num_prompts} x {self.samples_per_prompt} sequences of {self.text_tokens:.0f}"
        text += f" text + {self.image_tokens:.0f} image + {self.response_tokens:.0f} response"
        reading = f", readings of {self.reading_tokens:.0f}" if self.reading_tokens else ""
        return f"{text} tokens{reading}, {self.num_updates} updates"


@dataclass(frozen=True)
class PlannedRun:
    """A configured run on a type of GPU; `work` is one step of it."""

    config: Config
    hf_config: HFConfig
    gpu: Gpu
    work: Workload

    @property
    def has_rollouts(self) -> bool:
        """True if an engine samples responses."""
        return self.config.stage != "sft"

    @property
    def dtype_bytes(self) -> int:
        """Bytes of a weight or an activation."""
        return DTYPE_BYTES[self.config.model.dtype]

    @cached_property
    def trains_tower(self) -> bool:
        """True if any parameter of the vision tower is trained."""
        return not is_tower_frozen(self.hf_config, self.config.model.freeze)

    @property
    def row_tokens(self) -> float:
        """Expected length of a packed row: the budget, or a mean sequence that exceeds it."""
        return max(self.config.data.row_budget, self.work.sequence_tokens)

    @property
    def max_row_tokens(self) -> int:
        """Maximum length of a packed row: the budget, or the longest sequence admitted."""
        longest = self.config.data.max_prompt_tokens
        if self.has_rollouts:
            longest += self.config.rollout.max_response_tokens
        return max(self.config.data.row_budget, longest)


def workload(
    config: Config,
    hf_config: HFConfig,
    *,
    text_tokens: float | None = None,
    image_tokens: float | None = None,
    response_tokens: float | None = None,
    reading_tokens: float | None = None,
) -> Workload:
    """Return the workload of one step of a configuration.

    Args:
        config: of the run.
        hf_config: shape of the model.
        text_tokens: mean length of a prompt's text; None assumes `PROMPT_TEXT_TOKENS`.
        image_tokens: of its image; None assumes the geometric mean of the pixel limits.
        response_tokens: of a pass-1 response; None assumes `SHARE_OF_LIMIT` of its limit.
        reading_tokens: of a pass-2 response; None likewise.
    """
    data, rollout = config.data, config.rollout
    is_sft = config.stage == "sft"
    mean_pixels = math.sqrt(data.min_pixels * data.max_pixels)
    if is_sft or config.reward.recipe != "vision_sr1":
        reading_tokens = 0.0

    def known(given: float | None, assumed: float) -> float:
        return assumed if given is None else given

    return Workload(
        num_prompts=data.prompts_per_step,
        samples_per_prompt=1 if is_sft else rollout.samples_per_prompt,
        num_updates=1 if is_sft else data.prompts_per_step // config.algorithm.prompts_per_update,
        text_tokens=known(text_tokens, PROMPT_TEXT_TOKENS),
        image_tokens=known(image_tokens, mean_pixels / pixels_per_token(hf_config)),
        patches_per_token=hf_config.vision.spatial_merge_size**2,
        response_tokens=known(response_tokens, SHARE_OF_LIMIT * rollout.max_response_tokens),
        reading_tokens=known(reading_tokens, SHARE_OF_LIMIT * rollout.max_reading_tokens),
        max_response_tokens=rollout.max_response_tokens,
        max_reading_tokens=rollout.max_reading_tokens,
        has_reference=not is_sft and config.algorithm.kl_coefficient > 0,
        is_forked=rollout.pass2 == "fork",
    )


def pixels_per_token(hf_config: HFConfig) -> int:
    """Return the image area that becomes one merged token, pixels."""
    return (hf_config.vision.patch_size * hf_config.vision.spatial_merge_size) ** 2
