"""Datasheet numbers of GPUs, by the name that a user gives or that CUDA reports.

The source of each number is given here or in docs/planner.md; a number without a source is marked
as an assumption.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sr1.errors import ConfigError

GPUS_PER_NODE = 8
"""GPUs in the HGX and DGX machines of all types below, connected by NVLink."""


@dataclass(frozen=True)
class Gpu:
    """A type of GPU, in the SXM module of an HGX or DGX machine.

    Attributes:
        memory_bytes: from the datasheet, GB of 10^9 bytes.
        peak_flops: dense bfloat16 operations per second, from the datasheet (without sparsity).
        memory_rate: bytes per second, from the datasheet.
        nvlink_rate: bytes per second in one direction, half of the datasheet's sum.
        network_rate: bytes per second in one direction; one adapter per GPU as in NVIDIA's DGX.
        host_rate: bytes per second in one direction over PCIe.
        matmul_share: best measured share of the peak in large products (ml-engineering, MAMF).
        attention_share: share of the peak that FlashAttention-2 reaches.
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
        # FlashAttention-2 (arXiv 2307.08691) reaches 50 to 73 % of the peak; the middle is used.
        Gpu("a100", 80e9, 312e12, 2.039e12, 300e9, 25e9, 32e9, 0.869, 0.62),
        # The same kernels reach 35 % on Hopper (FlashAttention-3, arXiv 2407.08608).
        Gpu("h100", 80e9, 989e12, 3.35e12, 450e9, 50e9, 64e9, 0.803, 0.35),
        Gpu("h200", 141e9, 989e12, 4.8e12, 450e9, 50e9, 64e9, 0.803, 0.35),
        # Assumption: the share on Blackwell is that on Hopper; no figure was found.
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
"""CUDA's device name -> name above. Other members of a family, e.g. PCIe cards, are slower."""


def find_gpu(name: str) -> Gpu:
    """Return a GPU by its name, in upper or lower case; raise a ConfigError if it is unknown."""
    gpu = GPUS.get(name.lower())
    if gpu is None:
        raise ConfigError(f"--gpu {name[:40]!a} is unknown; expected one of {', '.join(GPUS)}")
    return gpu


def peak_of(device_name: str) -> float | None:
    """Return the peak of a GPU by CUDA's device name, operations per second; None if unknown."""
    name = DEVICE_NAMES.get(device_name)
    return None if name is None else GPUS[name].peak_flops
