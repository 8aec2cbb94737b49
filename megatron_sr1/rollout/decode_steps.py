"""Shorter ways through vLLM's Python for sequences that are past their prompt.

In most steps of a rollout each running sequence takes one token, and vLLM still looks for each of
them whether it needs a cache block, which images begin in this step, and where its token is. Then
the answers are known without looking: the token's place in its block, no images, and one position
after the last. Everything else is left to vLLM's own methods, which these replace in one engine.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

_MOST_KEPT = 256  # positions of prompts; a step's prompts share most of them


def shorten(scheduler: Any, runner: Any) -> None:
    """Replace the methods of an engine's scheduler and model runner."""
    manager = scheduler.kv_cache_manager
    manager.allocate_slots = partial(
        _allocate_slots, manager.allocate_slots, manager.empty_kv_cache_blocks, scheduler.block_size
    )
    scheduler._try_schedule_encoder_inputs = partial(
        _images_to_encode, scheduler._try_schedule_encoder_inputs
    )
    runner._init_mrope_positions = partial(_set_prompt_positions, runner.get_model(), {})
    for name, shorter in (
        ("_calc_mrope_positions", _set_positions),
        ("_gather_mm_embeddings", _embedded_images),
    ):
        setattr(runner, name, partial(shorter, getattr(runner, name), runner))


def keep_logprobs(core: Any, name: str) -> None:
    """Keep only the values of a live request's logprobs; `add_request` returned its name.

    vLLM would keep five lists for each request, to serve alternatives and texts of tokens.
    """
    processor = core.output_processor.request_states[name].logprobs_processor
    values = processor.logprobs.logprobs
    processor._update_sample_logprobs = lambda lists: values.extend(lists.logprobs[:, 0].tolist())


def _allocate_slots(
    allocate: Callable[..., Any],
    nothing: Any,
    block_tokens: int,
    request: Any,
    num_new_tokens: int,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Return no new block for a token that neither begins nor fills one."""
    if num_new_tokens == 1 and 0 < request.num_computed_tokens % block_tokens < block_tokens - 1:
        return nothing
    return allocate(request, num_new_tokens, *args, **kwargs)


def _images_to_encode(
    look: Callable[..., Any],
    request: Any,
    num_computed_tokens: int,
    num_new_tokens: int,
    budget: int,
    **kwargs: Any,
) -> Any:
    """Return that a sequence past its prompt has no images to encode."""
    if num_computed_tokens >= request.num_prompt_tokens:
        return [], num_new_tokens, budget, [], []
    return look(request, num_computed_tokens, num_new_tokens, budget, **kwargs)


def _set_prompt_positions(model: Any, kept: dict[Any, Any], state: Any) -> None:
    """Give a new sequence the rotary positions of its prompt.

    They depend on its length and on the places and sizes of its images alone, so the samples of a
    prompt share them.
    """
    images = tuple((f.identifier, f.mm_position.offset) for f in state.mm_features)
    key = len(state.prompt_token_ids), images
    if key not in kept:
        if len(kept) == _MOST_KEPT:
            kept.clear()
        kept[key] = model.get_mrope_input_positions(state.prompt_token_ids, state.mm_features)
    state.mrope_positions, state.mrope_position_delta = kept[key]


def _set_positions(calculate: Callable[..., None], runner: Any, output: Any) -> None:
    """Set the rotary positions [3, sequences] of a step."""
    if not _only_decodes(runner, output):
        return calculate(output)
    batch = runner.input_batch
    shifts = [runner.requests[name].mrope_position_delta for name in batch.req_ids]
    positions = batch.num_computed_tokens_cpu[: batch.num_reqs] + np.array(shifts)
    runner.mrope_positions.np[:, : batch.num_reqs] = positions


def _embedded_images(
    gather: Callable[..., Any], runner: Any, output: Any, *args: Any, **kwargs: Any
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Return a step's embeddings of images, and which tokens they replace."""
    if not _only_decodes(runner, output):
        return gather(output, *args, **kwargs)
    return [], torch.zeros(runner.input_batch.num_reqs, dtype=torch.bool)


def _only_decodes(runner: Any, output: Any) -> bool:
    """Return True if each sequence of a step takes one token, after its prompt."""
    batch, number = runner.input_batch, runner.input_batch.num_reqs
    past = batch.num_computed_tokens_cpu[:number] >= batch.num_prompt_tokens[:number]
    return output.total_num_scheduled_tokens == number and bool(past.all())
