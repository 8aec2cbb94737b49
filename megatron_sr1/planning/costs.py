"""Times of products, memory traffic and collectives, and the rates that programs reach.

In: operations or bytes and a GPU's datasheet rates (runtime/gpus.py). Out: seconds. The constants
were chosen before any comparison with published runs and are not fitted to one (docs/planner.md).
"""

from __future__ import annotations

from megatron_sr1.model.flops import Work
from megatron_sr1.runtime.gpus import Gpu

MEMORY_SHARE = 0.85
"""Assumption: share of the memory bandwidth that streaming kernels reach."""
LINK_SHARE = 0.8
"""Assumption: share of the bandwidth of NVLink, network and PCIe that transfers reach."""
COLLECTIVE_SECONDS = 10e-6
"""Assumption: minimum time of a collective within a node."""
ENGINE_STEP_SECONDS = 3e-3
"""Time of an engine step outside its kernels. vLLM 0.23 on an A100 40 GB with Llama 3.1 8B in
bfloat16 and one sequence reaches 75 tokens/s (a sweep by J. Musgrave, johnmusgrave.com): 13.3 ms a
step, of which reading the weights at 1,555 GB/s takes 10.3."""
ENGINE_SEQUENCE_SECONDS = 10e-6
"""Assumption: time of an engine step outside its kernels, per running sequence."""
RESERVED_BYTES = 3e9
"""Assumption: CUDA context, NCCL buffers, fragmentation of the allocator."""
ENGINE_RESERVED_BYTES = 3e9
"""Assumption: the engine's activations and CUDA graphs, part of its share of the memory."""


def compute_seconds(work: Work, gpu: Gpu) -> float:
    """Time of products and attention on one GPU."""
    dense = work.dense / (gpu.peak_flops * gpu.matmul_share)
    return dense + work.attention / (gpu.peak_flops * gpu.attention_share)


def memory_seconds(num_bytes: float, gpu: Gpu) -> float:
    """Time to read or write bytes of the GPU's memory once."""
    return num_bytes / (gpu.memory_rate * MEMORY_SHARE)


def transfer_seconds(num_bytes: float, rate: float) -> float:
    """Time to send bytes over a link of a datasheet rate, bytes a second in one direction."""
    return num_bytes / (rate * LINK_SHARE)


def all_reduce_seconds(num_bytes: float, ranks: int, rate: float) -> float:
    """Time of a ring all-reduce: each rank sends 2 (ranks - 1) / ranks of the bytes."""
    return gather_seconds(2 * num_bytes, ranks, rate)


def gather_seconds(num_bytes: float, ranks: int, rate: float) -> float:
    """Time of a ring all-gather or reduce-scatter; `num_bytes` is the size of the whole tensor."""
    if ranks == 1:
        return 0.0
    return COLLECTIVE_SECONDS + transfer_seconds(num_bytes * (ranks - 1) / ranks, rate)
