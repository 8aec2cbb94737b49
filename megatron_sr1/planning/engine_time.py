"""How long the engine takes: prefill of the prompts, decoding of both passes, the weight sync.

In: a model's shape, a GPU, a replica's share of the step. Out: seconds. A step of the engine reads
all weights and the running sequences' keys and values, or is bound by its products, whichever takes
longer. Lengths are drawn as if every token could be the last (memoryless), up to their limit: slots
stay full while requests wait, then the running ones die out by halves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_sr1.model import flops
from megatron_sr1.model.hf_config import HFConfig
from megatron_sr1.planning.costs import (
    COLLECTIVE_SECONDS,
    ENGINE_RESERVED_BYTES,
    ENGINE_SEQUENCE_SECONDS,
    ENGINE_STEP_SECONDS,
    all_reduce_seconds,
    memory_seconds,
    transfer_seconds,
)
from megatron_sr1.planning.static_memory import num_parameters
from megatron_sr1.planning.workload import DESCRIPTION_SHARE, Workload
from megatron_sr1.runtime.gpus import Gpu


@dataclass(frozen=True)
class Replica:
    """One engine replica.

    Attributes:
        hf_config: shape of the model.
        gpu: of its ranks.
        ranks: that it spans.
        memory_bytes: that it may take of each GPU.
        dtype_bytes: of weights, keys and values.
        max_num_seqs: slots.
    """

    hf_config: HFConfig
    gpu: Gpu
    ranks: int
    memory_bytes: float
    dtype_bytes: int
    max_num_seqs: int

    @property
    def weight_bytes(self) -> float:
        """On each rank."""
        return num_parameters(self.hf_config) * self.dtype_bytes / self.ranks

    @property
    def cache_bytes(self) -> float:
        """Left for keys and values on each rank."""
        return self.memory_bytes - self.weight_bytes - ENGINE_RESERVED_BYTES

    @property
    def cache_tokens(self) -> float:
        """That the cache holds."""
        return self.cache_bytes / self.token_bytes

    @property
    def token_bytes(self) -> float:
        """Keys and values of a token on each rank; heads fewer than ranks are repeated."""
        text = self.hf_config.text
        heads = max(text.num_key_value_heads / self.ranks, 1)
        return 2 * text.num_layers * heads * text.head_dim * self.dtype_bytes

    def slots(self, context_tokens: float) -> float:
        """Sequences that run at a time."""
        return max(1.0, min(self.max_num_seqs, self.cache_tokens / context_tokens))

    def step_seconds(self, running: float, context_tokens: float) -> float:
        """One step: a token for each of the running sequences."""
        text, gpu = self.hf_config.text, self.gpu
        layer = flops.text_layer(self.hf_config, running, context_tokens)
        work = layer.times(text.num_layers) + flops.head(self.hf_config, running)
        weights = work.dense / (2 * running) * self.dtype_bytes / self.ranks
        traffic = weights + running * context_tokens * self.token_bytes
        reading = memory_seconds(traffic, gpu)
        computing = work.dense / self.ranks / (gpu.peak_flops * gpu.matmul_share)
        joining = 0.0
        if self.ranks > 1:
            row = running * text.hidden_size * self.dtype_bytes
            once = all_reduce_seconds(row, self.ranks, gpu.nvlink_rate)
            joining = 2 * text.num_layers * max(once, COLLECTIVE_SECONDS)
        return (
            max(reading, computing)
            + joining
            + ENGINE_STEP_SECONDS
            + ENGINE_SEQUENCE_SECONDS * running
        )


def decode_seconds(
    replica: Replica, requests: float, mean: float, limit: float, context: float, load: float = 1.0
) -> float:
    """Until all requests have ended.

    Args:
        replica: that they run on.
        requests: of the replica.
        mean: steps that a request holds its slot.
        limit: most steps of a request.
        context: tokens that a running sequence has before it, on average.
        load: sequences that run for each slot, on average.
    """
    if requests <= 0 or mean <= 0:
        return 0.0
    slots = min(requests, replica.slots(context) / load)
    seconds = (requests - slots) * mean / slots * replica.step_seconds(slots * load, context)
    running, steps_left = slots, limit
    while running > 1 and steps_left > 0:
        steps = min(mean * math.log(2), steps_left)
        average = running * (1 / (2 * math.log(2)))
        seconds += steps * replica.step_seconds(max(average, 1) * load, context)
        running, steps_left = running / 2, steps_left - steps
    return seconds + min(mean, steps_left) * replica.step_seconds(load, context)


def pass_seconds(replica: Replica, work: Workload, replicas: int) -> tuple[float, float]:
    """Decoding of pass 1, and what pass 2 adds to it."""
    requests = work.num_sequences / replicas
    first, limit = work.response_tokens, work.most_response_tokens
    second, second_limit = work.reading_tokens, work.most_reading_tokens
    context = work.prompt_tokens + first / 2
    alone = decode_seconds(replica, requests, first, limit, context)
    if not second:
        return alone, 0.0
    second_context = work.reading_prompt_tokens + second / 2
    if not work.is_forked:
        return alone, decode_seconds(replica, requests, second, second_limit, second_context)
    # A rollout ends with its response or with its reading, which starts at the description's end.
    chain = max(first, DESCRIPTION_SHARE * first + second)
    longest = max(limit, DESCRIPTION_SHARE * limit + second_limit)
    mixed = (first * context + second * second_context) / (first + second)
    load = (first + second) / chain
    both = decode_seconds(replica, requests, chain, longest, mixed, load)
    return alone, max(both - alone, 0.0)


def prefill_work(hf_config: HFConfig, work: Workload) -> flops.Work:
    """Prompts once each (samples share them), images too; pass 2's prompts one a rollout.

    Logits are made of the last token only, and not counted.
    """
    length, patches = work.prompt_tokens, work.image_patches
    layers = hf_config.text.num_layers
    total = flops.text_layer(hf_config, length, length * flops.CAUSAL_SHARE).times(layers)
    total = (total + flops.vision(hf_config, patches, patches)).times(work.num_prompts)
    if work.reading_tokens:
        length = work.reading_prompt_tokens
        reading = flops.text_layer(hf_config, length, length * flops.CAUSAL_SHARE)
        total += reading.times(layers * work.num_sequences)
    return total


def decode_work(hf_config: HFConfig, work: Workload) -> tuple[flops.Work, flops.Work]:
    """Of pass 1 and of pass 2: every token once through the layers and the logits."""
    both = []
    pairs = (
        (work.response_tokens, work.prompt_tokens),
        (work.reading_tokens, work.reading_prompt_tokens),
    )
    for length, prompt in pairs:
        layer = flops.text_layer(hf_config, length, prompt + length / 2)
        once = layer.times(hf_config.text.num_layers) + flops.head(hf_config, length)
        both.append(once.times(work.num_sequences))
    return both[0], both[1]


def sync_seconds(replica: Replica, world: int) -> float:
    """Every rank gets the whole weights and writes its share of them into the engine."""
    num_bytes = num_parameters(replica.hf_config) * replica.dtype_bytes
    gpu = replica.gpu
    moving = 0.0 if world == 1 else transfer_seconds(num_bytes, gpu.nvlink_rate)
    # Read, joined and written on the way; then written and read once more by the engine.
    return moving + memory_seconds(4 * num_bytes, gpu)
