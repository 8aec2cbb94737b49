"""What is planned: a configured run on a type of GPU, and the mean lengths of its sequences.

A configuration has limits of lengths only. Lengths that the user does not give are assumed, and the
plan prints them, because every time depends on them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from megatron_sr1.checkpoint.mapping import Entry, entries, is_tower_frozen
from megatron_sr1.config.adapter import AdapterConfig
from megatron_sr1.config.run import Config
from megatron_sr1.model.hf_config import HFConfig
from megatron_sr1.planning.adapters import DTYPE_BYTES, Adapters, planned_adapters
from megatron_sr1.planning.costs import DESCRIPTION_SHARE, PROMPT_TEXT_TOKENS, SHARE_OF_LIMIT
from megatron_sr1.runtime.gpus import Gpu


@dataclass(frozen=True)
class PlannedRun:
    """A configured run on a type of GPU.

    Attributes:
        text_tokens: mean length of a prompt without its image.
        image_tokens: merged tokens of a prompt's image, mean.
        response_tokens: mean length of a pass-1 response; in SFT of the target.
        reading_tokens: mean length of a pass-2 response; 0 without pass 2.
    """

    config: Config
    hf_config: HFConfig
    gpu: Gpu
    text_tokens: float
    image_tokens: float
    response_tokens: float
    reading_tokens: float

    @property
    def has_rollouts(self) -> bool:
        """True if an engine samples responses."""
        return self.config.stage != "sft"

    @property
    def dtype_bytes(self) -> int:
        """Bytes of a weight or an activation."""
        return DTYPE_BYTES[self.config.model.dtype]

    @cached_property
    def adapters(self) -> Adapters | None:
        """What is trained in place of the model; None: the model."""
        config = self.config
        return planned_adapters(self.hf_config, config.adapter, config.model.dtype)

    def without_adapters(self) -> PlannedRun:
        """Return the run as it is while adapters are switched off: the model alone."""
        if self.adapters is None:
            return self
        return replace(self, config=replace(self.config, adapter=AdapterConfig()))

    @cached_property
    def trains_tower(self) -> bool:
        """True if any parameter of the vision tower, or an adapter in it, is trained."""
        if self.adapters is not None:
            return self.adapters.is_in_tower
        return not is_tower_frozen(self.hf_config, self.config.model.freeze)

    @property
    def samples_per_prompt(self) -> int:
        """Responses to each prompt."""
        return self.config.rollout.samples_per_prompt if self.has_rollouts else 1

    @property
    def num_sequences(self) -> int:
        """Sequences per step."""
        return self.config.data.prompts_per_step * self.samples_per_prompt

    @property
    def patches_per_token(self) -> int:
        """Image patches that are merged into one token."""
        return self.hf_config.vision.spatial_merge_size**2

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
    def reading_prompt_tokens(self) -> float:
        """Length of a pass-2 prompt: instructions, question and description."""
        return self.text_tokens + DESCRIPTION_SHARE * self.response_tokens

    @property
    def row_tokens(self) -> float:
        """Expected length of a packed row: the budget, or a mean sequence that exceeds it."""
        return max(self.config.data.row_budget, self.sequence_tokens)

    @property
    def max_row_tokens(self) -> int:
        """Maximum length of a packed row: the budget, or the longest sequence admitted."""
        longest = self.config.data.max_prompt_tokens
        if self.has_rollouts:
            longest += self.config.rollout.max_response_tokens
        return max(self.config.data.row_budget, longest)


def planned_run(
    config: Config, hf_config: HFConfig, gpu: Gpu, lengths: Mapping[str, float | None] | None = None
) -> PlannedRun:
    """Return a run with the mean lengths that are given, and assumptions for the others.

    `lengths` are fields of `PlannedRun`. Assumed are `PROMPT_TEXT_TOKENS`, an image of the
    geometric mean of the pixel limits, and `SHARE_OF_LIMIT` of the limits of responses.
    """
    data, rollout = config.data, config.rollout
    mean_pixels = math.sqrt(data.min_pixels * data.max_pixels)
    means: dict[str, float] = {
        "text_tokens": PROMPT_TEXT_TOKENS,
        "image_tokens": mean_pixels / pixels_per_token(hf_config),
        "response_tokens": SHARE_OF_LIMIT * rollout.max_response_tokens,
        "reading_tokens": SHARE_OF_LIMIT * rollout.max_reading_tokens,
    }
    means |= {name: given for name, given in (lengths or {}).items() if given is not None}
    if config.stage == "sft" or config.reward.recipe != "vision_sr1":
        means["reading_tokens"] = 0.0
    return PlannedRun(config, hf_config, gpu, **means)


def pixels_per_token(hf_config: HFConfig) -> int:
    """Return the image area that becomes one merged token, pixels."""
    return (hf_config.vision.patch_size * hf_config.vision.spatial_merge_size) ** 2


def num_parameters(hf_config: HFConfig, part: str = "") -> int:
    """Return the parameters of the published model, or of the part with a name prefix."""
    return sum(numel(entry) for entry in entries(hf_config) if entry.name.startswith(part))


def numel(entry: Entry) -> int:
    """Return the elements of a whole parameter, without padding."""
    return sum(math.prod(shape) for shape in entry.hf_shapes)
