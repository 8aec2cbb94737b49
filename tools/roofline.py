"""A written-down cost model of an engine step on a GPU: what the memory and the arithmetic allow.

In: records of engine steps and a model's published config.json. Out: seconds. A step is, one behind
the other, the decoder's matrices, the output layer and attention, each at the larger of its bytes
over the bandwidth and its operations over the stated share of the peak, plus a fixed time:

    matrices   max(2 N / B,  2 N tokens / F)
    output     max(2 V / B,  2 V sequences / F)
    attention  K context / B
    step       their sum + overhead

N: weights of the decoder's matrices, V: of the output layer, 2 bytes each; K: bytes of keys and
values a token. Left out: attention's own operations (under 3 % of a prompt's at 1,000 tokens, and
far below the bandwidth's time when decoding), activations, norms and the vision tower, which runs
once an image and the same under every schedule.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sr1.planning.costs import ENGINE_STEP_SECONDS
from megatron_sr1.rollout.recording import EngineStep
from megatron_sr1.runtime.gpus import Gpu, find_gpu

WEIGHT_BYTES = 2  # bfloat16


@dataclass(frozen=True)
class Hardware:
    """A GPU and the engine that drives it.

    Attributes:
        bytes_per_second: of its memory.
        flops_per_second: peak of dense bfloat16.
        flops_share: of that peak which matrices reach.
        step_overhead_seconds: of a step beside its kernels: scheduling, launches, sampling.
        memory_bytes: of its memory.
    """

    bytes_per_second: float
    flops_per_second: float
    flops_share: float
    step_overhead_seconds: float
    memory_bytes: float


def hardware_of(gpu: Gpu) -> Hardware:
    """What the planner's table says of a GPU."""
    return Hardware(
        bytes_per_second=gpu.memory_rate,
        flops_per_second=gpu.peak_flops,
        flops_share=gpu.matmul_share,
        step_overhead_seconds=ENGINE_STEP_SECONDS,
        memory_bytes=gpu.memory_bytes,
    )


H100 = hardware_of(find_gpu("h100"))


@dataclass(frozen=True)
class Shape:
    """What a language model moves and computes.

    Attributes:
        matrix_weights: of the decoder's matrices (N).
        output_weights: of the output layer (V).
        kv_bytes: keys and values of a token in all layers (K).
    """

    matrix_weights: int
    output_weights: int
    kv_bytes: int

    @property
    def weight_bytes(self) -> int:
        """Read in every step."""
        return WEIGHT_BYTES * (self.matrix_weights + self.output_weights)


def read_shape(path: Path) -> Shape:
    """The shape in a published config.json."""
    return shape_of(json.loads(path.read_text()))


def shape_of(config: Mapping[str, Any]) -> Shape:
    """The shape of a configuration with the text model's keys at its top."""
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    head_dim = hidden // config["num_attention_heads"]
    kv_width = config["num_key_value_heads"] * head_dim
    attention = 2 * hidden * hidden + 2 * hidden * kv_width  # query and output; key and value
    mlp = 3 * hidden * config["intermediate_size"]  # gate, up and down
    return Shape(
        matrix_weights=layers * (attention + mlp),
        output_weights=config["vocab_size"] * hidden,
        kv_bytes=WEIGHT_BYTES * 2 * layers * kv_width,
    )


def step_seconds(step: EngineStep, shape: Shape, hardware: Hardware = H100) -> float:
    """Time of one engine step."""
    bandwidth = hardware.bytes_per_second
    flops = hardware.flops_per_second * hardware.flops_share

    def matrix_seconds(weights: int, rows: int) -> float:
        return max(WEIGHT_BYTES * weights / bandwidth, 2 * weights * rows / flops)

    tokens = step.prefill_tokens + step.decoding_sequences
    sequences = step.prefill_sequences + step.decoding_sequences
    return (
        matrix_seconds(shape.matrix_weights, tokens)
        + matrix_seconds(shape.output_weights, sequences)
        + shape.kv_bytes * step.context_tokens / bandwidth
        + hardware.step_overhead_seconds
    )


def replay_seconds(steps: Iterable[EngineStep], shape: Shape, hardware: Hardware = H100) -> float:
    """Time of a whole schedule."""
    return sum(step_seconds(step, shape, hardware) for step in steps)
