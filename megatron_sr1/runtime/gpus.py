"""What GPUs can do: datasheet numbers, and the shares of them that programs reach.

In: a name as `h100`. Out: a `Gpu`. Where each number comes from stands beside it and in
docs/planner.md; what has no source is called an assumption. Nothing here is fitted to runs.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sr1.errors import ConfigError

GPUS_PER_NODE = 8
"""Of the HGX and DGX machines of all GPUs below; NVLink joins them."""


@dataclass(frozen=True)
class Gpu:
    """One GPU in its machine.

    Attributes:
        name: as the command line takes it.
        memory_bytes: of the datasheet, GB of 10^9 bytes.
        peak_flops: dense bfloat16 operations a second, of the datasheet (without sparsity).
        memory_rate: bytes a second, of the datasheet.
        nvlink_rate: bytes a second in one direction, half of the datasheet's sum of both.
        network_rate: bytes a second in one direction, one adapter a GPU as in NVIDIA's DGX.
        host_rate: bytes a second in one direction over PCIe.
        matmul_share: of the peak, the best large product measured (ml-engineering, MAMF).
        attention_share: of the peak, FlashAttention-2.
    """

    name: str
    memory_bytes: float
    peak_flops: float
    memory_rate: float
    nvlink_rate: float
    network_rate: float
    host_rate: float
    matmul_share: float
    attention_share: float


GPUS = {
    gpu.name: gpu
    for gpu in (
        # FlashAttention-2 (arXiv 2307.08691): 50 to 73 % of the peak; the middle.
        Gpu("a100", 80e9, 312e12, 2.039e12, 300e9, 25e9, 32e9, 0.869, 0.62),
        # The same kernels reach 35 % on Hopper (FlashAttention-3, arXiv 2407.08608).
        Gpu("h100", 80e9, 989e12, 3.35e12, 450e9, 50e9, 64e9, 0.803, 0.35),
        Gpu("h200", 141e9, 989e12, 4.8e12, 450e9, 50e9, 64e9, 0.803, 0.35),
        # Assumption: on Blackwell as on Hopper; no figure was found.
        Gpu("b200", 180e9, 2250e12, 7.7e12, 900e9, 50e9, 64e9, 0.776, 0.35),
    )
}
DEVICE_NAMES = {
    "NVIDIA A100-SXM4-40GB": "a100",
    "NVIDIA A100-SXM4-80GB": "a100",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
    "NVIDIA B200": "b200",
}
"""What CUDA calls a GPU -> its name above. Others of the same family, as PCIe cards, are slower."""


def find_gpu(name: str) -> Gpu:
    """A GPU by its name, in any case.

    Raises:
        ConfigError: it is not in the table.
    """
    gpu = GPUS.get(name.lower())
    if gpu is None:
        raise ConfigError(f"--gpu {name[:40]!a} is not known; one of {', '.join(GPUS)}")
    return gpu


def peak_of(device_name: str) -> float | None:
    """Peak of a GPU by what CUDA calls it, operations a second; None if it is not known."""
    name = DEVICE_NAMES.get(device_name)
    return None if name is None else GPUS[name].peak_flops
