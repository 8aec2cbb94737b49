"""Times of products, memory traffic and collectives, and all assumptions of the planner.

In: operations or bytes and a GPU's datasheet rates (runtime/gpus.py). Out: seconds. No constant is
fitted to the published runs that docs/planner.md compares with.
"""

from __future__ import annotations

from megatron_sr1.model.flops import Work
from megatron_sr1.runtime.gpus import Gpu

PROMPT_TEXT_TOKENS = 250
"""Assumption: mean length of instructions and question."""
SHARE_OF_LIMIT = 0.5
"""Assumption: mean length of a response or reading over its limit."""
DESCRIPTION_SHARE = 0.5
"""Assumption: share of a response that is generated when its description ends."""
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
ENGINE_SEQUENCE_SECONDS = 40e-6
"""Time of an engine step outside its kernels, per running sequence: vLLM's scheduler, inputs and
outputs and our loop, measured by tools/bench_host.py on a core of an Intel Xeon without a GPU."""
RESERVED_BYTES = 3e9
"""Assumption: CUDA context, NCCL buffers, fragmentation of the allocator."""
ENGINE_RESERVED_BYTES = 3e9
"""Assumption: the engine's activations and CUDA graphs, part of its share of the memory."""


def compute_seconds(work: Work, gpu: Gpu) -> float:
    """Return the time of products and attention on one GPU."""
    dense = work.dense / (gpu.peak_flops * gpu.matmul_share)
    attention = work.attention / (gpu.peak_flops * gpu.attention_share)
    return dense + attention + work.float32 / (gpu.float32_flops * gpu.matmul_share)


def memory_seconds(num_bytes: float, gpu: Gpu) -> float:
    """Return the time to read or write bytes of the GPU's memory once."""
    return num_bytes / (gpu.memory_rate * MEMORY_SHARE)


def transfer_seconds(num_bytes: float, rate: float) -> float:
    """Return the time to send bytes over a link; `rate` is its datasheet's, one direction."""
    return num_bytes / (rate * LINK_SHARE)


def gather_seconds(num_bytes: float, ranks: int, rate: float) -> float:
    """Return the time of a ring all-gather or reduce-scatter of a tensor of `num_bytes`.

    An all-reduce takes as long as a gather of twice the bytes.
    """
    if ranks == 1:
        return 0.0
    return COLLECTIVE_SECONDS + transfer_seconds(num_bytes * (ranks - 1) / ranks, rate)
