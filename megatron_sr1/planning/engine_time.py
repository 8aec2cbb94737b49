"""Time of the engine's phases: weight sync, prefill, decoding of both passes.

An engine step takes the longer of its memory traffic (all weights, the keys and values of the
running sequences) and its products. Lengths are memoryless, each token being equally likely to be
the last, up to their limit: the slots stay full while requests wait, then the number of running
sequences halves again and again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_sr1.model import flops
from megatron_sr1.model.hf_config import HFConfig
from megatron_sr1.planning import costs
from megatron_sr1.planning.workload import PlannedRun, num_parameters
from megatron_sr1.runtime.gpus import Gpu


@dataclass(frozen=True)
class Replica:
    """An engine replica.

    Attributes:
        ranks: tensor-parallel ranks, one GPU each.
        memory_bytes: the engine's share of each GPU's memory.
        dtype_bytes: size of a weight, key or value.
        step_overhead_seconds: time of a step outside its kernels: scheduling, launches, sampling.
    """

    hf_config: HFConfig
    gpu: Gpu
    ranks: int
    memory_bytes: float
    dtype_bytes: int
    max_num_seqs: int
    step_overhead_seconds: float = costs.ENGINE_STEP_SECONDS

    @property
    def weight_bytes(self) -> float:
        """All weights on each rank."""
        return num_parameters(self.hf_config) * self.dtype_bytes / self.ranks

    @property
    def layer_weights(self) -> float:
        """Weights of the decoder layers' products, all ranks together; a step reads them once."""
        return flops.text_layer(self.hf_config, 1, 0).dense / 2 * self.hf_config.text.num_layers

    @property
    def output_weights(self) -> float:
        """Weights of the output layer, all ranks together; a step reads them once."""
        return flops.head(self.hf_config, 1).dense / 2

    @property
    def cache_bytes(self) -> float:
        """Memory left for keys and values on each rank."""
        return self.memory_bytes - self.weight_bytes - costs.ENGINE_RESERVED_BYTES

    @property
    def cache_tokens(self) -> float:
        """Tokens whose keys and values fit."""
        return self.cache_bytes / self.token_bytes

    @property
    def token_bytes(self) -> float:
        """Keys and values of a token on each rank; with fewer heads than ranks, heads repeat."""
        text = self.hf_config.text
        heads = max(text.num_key_value_heads / self.ranks, 1)
        return 2 * text.num_layers * heads * text.head_dim * self.dtype_bytes

    def step_seconds(self, running: float, context_tokens: float) -> float:
        """Return the time of a decoding step: one token for each running sequence.

        `context_tokens` is the mean number of tokens before the new one.
        """
        text, gpu = self.hf_config.text, self.gpu
        weights = self.layer_weights + self.output_weights
        traffic = weights * self.dtype_bytes / self.ranks
        traffic += running * context_tokens * self.token_bytes
        products = 2 * running * weights / self.ranks / (gpu.peak_flops * gpu.matmul_share)
        row = running * text.hidden_size * self.dtype_bytes
        all_reduce = costs.gather_seconds(2 * row, self.ranks, gpu.link_rate)
        collectives = 2 * text.num_layers * all_reduce
        overhead = self.step_overhead_seconds + costs.ENGINE_SEQUENCE_SECONDS * running
        return max(costs.memory_seconds(traffic, gpu), products) + collectives + overhead

    def decode_seconds(
        self, requests: float, mean: float, limit: float, context: float, load: float = 1.0
    ) -> float:
        """Return the time until all requests of this replica have finished.

        A request holds its slot for `mean` steps, at most `limit`. A slot runs `load` sequences on
        average, with `context` tokens before the new one.
        """
        if requests <= 0 or mean <= 0:
            return 0.0
        running = max(1.0, min(self.max_num_seqs, self.cache_tokens / context))
        slots = min(requests, running / load)
        seconds = (requests - slots) * mean / slots * self.step_seconds(slots * load, context)
        running, steps_left = slots, limit
        while running > 1 and steps_left > 0:
            steps = min(mean * math.log(2), steps_left)
            average = running * (1 / (2 * math.log(2)))
            seconds += steps * self.step_seconds(max(average, 1) * load, context)
            running, steps_left = running / 2, steps_left - steps
        return seconds + min(mean, steps_left) * self.step_seconds(load, context)

    def pass_seconds(self, run: PlannedRun, replicas: int) -> tuple[float, float]:
        """Return the decoding time of pass 1 and what pass 2 adds, on each of `replicas`."""
        requests, rollout = run.num_sequences / replicas, run.config.rollout
        first, limit = run.response_tokens, rollout.max_response_tokens
        second, second_limit = run.reading_tokens, rollout.max_reading_tokens
        context = run.prompt_tokens + first / 2
        alone = self.decode_seconds(requests, first, limit, context)
        second_context = run.reading_prompt_tokens + second / 2
        if not second or rollout.pass2 != "fork":
            return alone, self.decode_seconds(requests, second, second_limit, second_context)
        # A rollout ends with its response or its reading, which starts when the description ends.
        chain = max(first, costs.DESCRIPTION_SHARE * first + second)
        longest = max(limit, costs.DESCRIPTION_SHARE * limit + second_limit)
        mixed = (first * context + second * second_context) / (first + second)
        load = (first + second) / chain
        both = self.decode_seconds(requests, chain, longest, mixed, load)
        return alone, max(both - alone, 0.0)

    def sync_seconds(self, run: PlannedRun, world: int) -> float:
        """Return the time of a weight sync from `world` ranks.

        With adapters only layers that have some are sent, or the adapters alone to the engine's own
        LoRA; an engine that dropped its weights needs all.
        """
        numel, rollout = num_parameters(self.hf_config), run.config.rollout
        if run.adapters and rollout.sleep_level != 2:
            is_alone = rollout.lora == "engine"
            numel = run.adapters.numel if is_alone else run.adapters.merged_numel
        num_bytes = numel * self.dtype_bytes
        moving = 0.0 if world == 1 else costs.transfer_seconds(num_bytes, self.gpu.link_rate)
        # Read and written to be gathered, then written and read once more by the engine.
        return moving + costs.memory_seconds(4 * num_bytes, self.gpu)


def prefill_work(run: PlannedRun) -> flops.Work:
    """Return the operations of a step's prefill.

    Each prompt and its image count once, as its samples share them; pass 2 has a prompt per
    rollout. Logits, which are computed for the last token only, are not counted.
    """
    prompt = flops.text(run.hf_config, run.prompt_tokens, 0)
    prompt += flops.vision(run.hf_config, run.image_patches, run.image_patches)
    total = prompt.times(run.config.data.prompts_per_step)
    if run.reading_tokens:
        reading = flops.text(run.hf_config, run.reading_prompt_tokens, 0)
        total += reading.times(run.num_sequences)
    return total
