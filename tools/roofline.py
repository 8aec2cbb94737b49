"""Time of recorded engine steps on the planner's model of a GPU (planning/engine_time.py).

In: records of engine steps and a replica. Out: seconds. The planner times a mean decoding step; a
recorded step has its own prompts, so each of its parts has a time: the decoder's matrices, the
output layer and attention, one after the other, plus the replica's fixed time a step:

    matrices   max(2 N / B,  2 N tokens / F)
    output     max(2 V / B,  2 V sequences / F)
    attention  K context / B

N and V are the weights of the decoder's matrices and of the output layer, 2 bytes each, K the bytes
of a token's keys and values, B the bandwidth, F the reachable share of the peak. Left out:
attention's own operations (under 3 % of a prompt's at 1,000 tokens, and far below the time of its
traffic when decoding), activations, norms and the vision tower, which runs once an image and is the
same under every schedule.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from megatron_sr1.model.hf_config import HFConfig, parse_hf_config
from megatron_sr1.planning.engine_time import Replica
from megatron_sr1.runtime.gpus import find_gpu
from tools.recording import EngineStep

PUBLISHED = Path(__file__).resolve().parent.parent / "tests" / "published"
H100 = find_gpu("h100")


def read_published(size: str) -> HFConfig:
    """Return the shape of a published model, e.g. "7b"."""
    return parse_hf_config(json.loads((PUBLISHED / f"qwen25vl_{size}.json").read_text()))


def whole_gpu(hf_config: HFConfig) -> Replica:
    """Return a bfloat16 replica that has one H100 to itself."""
    return Replica(hf_config, H100, 1, H100.memory_bytes, dtype_bytes=2, max_num_seqs=512)


def step_seconds(step: EngineStep, replica: Replica) -> float:
    """Return the time of one engine step on a replica of one rank."""
    gpu = replica.gpu
    bandwidth, flops = gpu.memory_rate, gpu.peak_flops * gpu.matmul_share

    def matrix_seconds(weights: float, rows: int) -> float:
        return max(replica.dtype_bytes * weights / bandwidth, 2 * weights * rows / flops)

    tokens = step.prefill_tokens + step.decoding_sequences
    sequences = step.prefill_sequences + step.decoding_sequences
    return (
        matrix_seconds(replica.layer_weights, tokens)
        + matrix_seconds(replica.output_weights, sequences)
        + replica.token_bytes * step.context_tokens / bandwidth
        + replica.step_overhead_seconds
    )


def replay_seconds(steps: Iterable[EngineStep], replica: Replica) -> float:
    """Return the time of a whole schedule."""
    return sum(step_seconds(step, replica) for step in steps)
