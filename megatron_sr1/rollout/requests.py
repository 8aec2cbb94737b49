"""Records between the engine and whoever rolls out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_sr1.errors import EngineError
from megatron_sr1.records import Completion

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class Request:
    """Something to sample.

    Attributes:
        id: unique among the live requests, the same on all ranks of a replica.
        token_ids: prompt for the engine: each image a single image-pad id.
        expanded_token_ids: the same prompt as the trainer has it; the engine must agree.
        images: RGB images, in order.
        temperature: 0 is greedy.
        max_tokens: most tokens to sample, the end of turn included.
        seed: of this request's draws, in [0, 2**31).
        with_logprobs: whether the completion brings the engine's logprobs.
        watched: whether each step tells the tokens so far.
        num_scored: so many tokens at the prompt's end are given and their logprobs wanted, at
            temperature 1, by prefill alone; 0: the request samples.
    """

    id: str
    token_ids: tuple[int, ...]
    expanded_token_ids: tuple[int, ...]
    images: tuple[Image.Image, ...] = ()
    temperature: float = 1.0
    max_tokens: int = 16
    seed: int = 0
    with_logprobs: bool = True
    watched: bool = False
    num_scored: int = 0

    def check_length(self, max_model_len: int) -> None:
        """Raise EngineError if prompt and sampled tokens can be more than the engine's length."""
        length = len(self.expanded_token_ids)
        num_sampled = 1 if self.num_scored else self.max_tokens
        if length + num_sampled > max_model_len:
            raise EngineError(
                f"request {self.id}: a prompt of {length} tokens and up to {num_sampled} sampled "
                f"are more than the engine's {max_model_len}; raise rollout.max_model_len or "
                "lower the limits"
            )

    def check_expansion(self, engine_token_ids: Sequence[int]) -> None:
        """Raise EngineError if the engine expands the prompt otherwise than the trainer."""
        if tuple(engine_token_ids) != self.expanded_token_ids:
            raise EngineError(
                f"request {self.id}: the engine expands the prompt to {len(engine_token_ids)} "
                f"tokens, the trainer to {len(self.expanded_token_ids)}, or to others; pixel "
                "limits and image processor of engine and trainer must be the same "
                "(data.min_pixels, data.max_pixels)"
            )


@dataclass(frozen=True)
class Progress:
    """What a step brought for one request.

    Attributes:
        id: of the request.
        token_ids: everything sampled so far; a view, to be read before the next step.
        completion: the whole, once it is finished.
    """

    id: str
    token_ids: Sequence[int]
    completion: Completion | None
