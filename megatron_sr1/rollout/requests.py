"""Records that the engine takes and returns."""

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
    """A sequence to sample, or to score.

    Attributes:
        id: unique among the live requests, the same on all ranks of a replica.
        token_ids: prompt for the engine, a single image-pad id per image.
        expanded_token_ids: the trainer's tokens of the same prompt, which the engine's must equal.
        images: RGB images, in order.
        temperature: 0 is greedy.
        max_tokens: maximum number of sampled tokens, including the end of turn.
        seed: sampling seed of this request, in [0, 2**31).
        with_logprobs: whether the completion contains the engine's logprobs.
        watched: whether each step reports the tokens so far.
        num_scored: number of tokens at the end of the prompt to score at temperature 1, by prefill
            alone; 0: the request samples.
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
        """Raise EngineError if prompt and sampled tokens can exceed `max_model_len`."""
        length = len(self.expanded_token_ids)
        num_sampled = 1 if self.num_scored else self.max_tokens
        if length + num_sampled > max_model_len:
            raise EngineError(
                f"request {self.id}: a prompt of {length} tokens and up to {num_sampled} sampled "
                f"ones exceed the engine's {max_model_len}; raise rollout.max_model_len or lower "
                "the token limits"
            )

    def check_expansion(self, engine_token_ids: Sequence[int]) -> None:
        """Raise EngineError if the engine expands the prompt to other tokens than the trainer."""
        if tuple(engine_token_ids) != self.expanded_token_ids:
            raise EngineError(
                f"request {self.id}: the engine expands the prompt to {len(engine_token_ids)} "
                f"tokens, the trainer to {len(self.expanded_token_ids)}, or to different ones; "
                "engine and trainer must use the same image processor and pixel limits "
                "(data.min_pixels, data.max_pixels)"
            )


@dataclass(frozen=True)
class Progress:
    """State of one request after a step.

    Attributes:
        id: the request's id.
        token_ids: all tokens sampled so far; a view, valid until the next step.
        completion: the result, once the request is finished.
    """

    id: str
    token_ids: Sequence[int]
    completion: Completion | None
