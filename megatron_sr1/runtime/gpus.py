"""Datasheet numbers of GPUs, by the name that a user gives or that CUDA reports.

The source of each number is given here or in docs/planner.md; a number without a source is marked
as an assumption.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sr1.errors import ConfigError

GPUS_PER_NODE = 8
"""GPUs in the HGX and DGX machines of the SXM modules below, and the most that a server with PCIe
cards has here."""


@dataclass(frozen=True)
class Gpu:
    """A type of GPU: the SXM module of an HGX or DGX machine, or a PCIe card.

    Attributes:
        memory_bytes: from the datasheet, GB of 10^9 bytes.
        peak_flops: dense bfloat16 operations per second, sums in float32, from the datasheet
            (without sparsity).
        float32_flops: the same in float32, without TF32, which torch leaves off.
        memory_rate: bytes per second, from the datasheet.
        link_rate: bytes per second in one direction between the GPUs of a machine: half of
            NVLink's sum, or PCIe of 16 lanes for cards, which have no NVLink.
        network_rate: bytes per second in one direction; one adapter per GPU as in NVIDIA's DGX.
        host_rate: bytes per second in one direction over PCIe.
        matmul_share: best measured share of the peak in large products (docs/planner.md).
        attention_share: share of the peak that FlashAttention-2 reaches.
    """

    name: str
    memory_bytes: float
    peak_flops: float
    float32_flops: float
    memory_rate: float
    link_rate: float
    network_rate: float
    host_rate: float
    matmul_share: float
    attention_share: float


PCIE_4, PCIE_5 = 32e9, 64e9
ETHERNET_100 = 12.5e9
"""Assumption: one adapter of 100 Gb/s for each card of a server."""

GPUS = {
    gpu.name: gpu
    for gpu in (
        # FlashAttention-2 (arXiv 2307.08691) reaches 50 to 73 % of the peak; the middle is used.
        Gpu("a100", 80e9, 312e12, 19.5e12, 2.039e12, 300e9, 25e9, PCIE_4, 0.869, 0.62),
        Gpu("a100-40gb", 40e9, 312e12, 19.5e12, 1.555e12, 300e9, 25e9, PCIE_4, 0.869, 0.62),
        # The same kernels reach 35 % on Hopper (FlashAttention-3, arXiv 2407.08608).
        Gpu("h100", 80e9, 989e12, 67e12, 3.35e12, 450e9, 50e9, PCIE_5, 0.803, 0.35),
        Gpu("h200", 141e9, 989e12, 67e12, 4.8e12, 450e9, 50e9, PCIE_5, 0.803, 0.35),
        # Assumption: the share on Blackwell is that on Hopper; no figure was found.
        Gpu("b200", 180e9, 2250e12, 75e12, 7.7e12, 900e9, 50e9, PCIE_5, 0.776, 0.35),
        # Cards run Ampere's kind of kernels. Assumption: they reach the shares of the A100, where
        # no measured product is cited in docs/planner.md.
        Gpu(
            "rtx4090", 24e9, 165.2e12, 82.6e12, 1.008e12, PCIE_4, ETHERNET_100, PCIE_4, 0.869, 0.62
        ),
        Gpu("rtx5090", 32e9, 209.5e12, 104.8e12, 1.792e12, PCIE_5, ETHERNET_100, PCIE_5, 1.0, 0.62),
        Gpu("l40s", 48e9, 362.05e12, 91.6e12, 0.864e12, PCIE_4, ETHERNET_100, PCIE_4, 0.869, 0.62),
        Gpu(
            "rtxpro6000",
            96e9,
            503.8e12,
            125e12,
            1.792e12,
            PCIE_5,
            ETHERNET_100,
            PCIE_5,
            0.908,
            0.62,
        ),
    )
}
DEVICE_NAMES = {
    "NVIDIA A100-SXM4-40GB": "a100-40gb",
    "NVIDIA A100-SXM4-80GB": "a100",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
    "NVIDIA B200": "b200",
    "NVIDIA GeForce RTX 4090": "rtx4090",
    "NVIDIA GeForce RTX 5090": "rtx5090",
    "NVIDIA L40S": "l40s",
    "NVIDIA RTX PRO 6000 Blackwell Workstation Edition": "rtxpro6000",
}
"""CUDA's device name -> name above. Others of a family, e.g. an A100 for PCIe, are slower."""


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
