"""The device, what is installed, and the rates that other rows are judged by."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from megatron_sr1.gpu_checks.bench import GIB, Bench
from megatron_sr1.gpu_checks.rows import Row, at_least, at_most, fact
from megatron_sr1.runtime.gpus import DEVICE_NAMES, GPUS, Gpu
from megatron_sr1.runtime.versions import versions

COPY_SHARE, MATMUL_SHARE = 0.6, 0.5
"""Shares of the datasheet's rates that a GPU in order exceeds by far."""
HOST_COPY_RATE = 10e9
"""Bytes per second over PCIe from pinned memory; version 4 with 16 lanes has 32e9."""
LAUNCH_SECONDS = 20e-6
"""Host time of a small operation; 5 to 10 microseconds are usual."""


def facts(bench: Bench) -> Iterator[Row]:
    """Name device and versions; measure copies, a product, and the host's time per operation."""
    device = bench.device
    yield fact("software", software())
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        text = f"{torch.cuda.device_count()} x {found.name}, {found.total_memory / GIB:.0f} GiB"
        note = f"compute capability {found.major}.{found.minor}, {found.multi_processor_count} SMs"
        yield fact("device", text, note=note)
    else:
        yield fact("device", f"CPU, {torch.get_num_threads()} threads", note="no GPU is used")
    gpu = known_gpu(bench)
    copied = copy_rate(bench)
    multiplied = matmul_rate(bench)
    bench.known |= {"copy_rate": copied, "matmul_rate": multiplied}
    slow = "the GPU is shared, throttled or not the one of its name: other rates suffer as well"
    yield _rate("device copy, read and written", copied / 1e9, "GB/s", _of(gpu, "copy"), slow)
    yield _rate("bfloat16 product", multiplied / 1e12, "TFLOP/s", _of(gpu, "matmul"), slow)
    launch = 1e6 * launch_seconds(bench)
    if device.type == "cuda":
        slow = "a slow or busy host: GPUs will wait for Python"
        limit = LAUNCH_SECONDS * 1e6
        yield at_most("host time of a small operation", launch, limit, slow, "us")
        pinned = torch.empty(2**28, dtype=torch.uint8, pin_memory=True)
        target = torch.empty_like(pinned, device=device)
        seconds = bench.seconds(lambda: target.copy_(pinned, non_blocking=True))
        slow = "a slow PCIe link: avoid optimizer.offload and rollout.make_room=optimizer"
        rate = len(pinned) / seconds / 1e9
        yield at_least("copy from pinned host memory", rate, HOST_COPY_RATE / 1e9, slow, "GB/s")
    else:
        yield fact("time of a small operation", launch, "us")


def software() -> str:
    """Return the versions of Python, of what is installed, and of CUDA's libraries."""
    import megatron.core  # a wheel on the path has no metadata there

    found = versions()
    found.setdefault("megatron-core", megatron.core.__version__)
    parts = [f"{name} {text}" for name, text in found.items()]
    if torch.version.cuda and torch.cuda.is_available():
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
        cudnn = torch.backends.cudnn.version()
        parts.append(f"CUDA {torch.version.cuda}, NCCL {nccl}, cuDNN {cudnn}")
    return ", ".join(parts)


def known_gpu(bench: Bench) -> Gpu | None:
    """Return the datasheet of the device, if it is in our list."""
    if bench.device.type != "cuda":
        return None
    name = DEVICE_NAMES.get(torch.cuda.get_device_name(bench.device))
    return None if name is None else GPUS[name]


def copy_rate(bench: Bench) -> float:
    """Return the rate of a copy within the device, bytes read and written per second."""
    size = 2**32 if bench.kind == "cuda" else 2**24
    source = torch.ones(size, dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * size / bench.seconds(lambda: target.copy_(source))


def matmul_rate(bench: Bench) -> float:
    """Return the rate of a square bfloat16 product of random numbers, operations per second."""
    width = 8192 if bench.kind == "cuda" else 256
    left, right = (
        torch.randn(width, width, device=bench.device, dtype=torch.bfloat16) for _ in range(2)
    )
    multiply: Callable[[], torch.Tensor] = lambda: left @ right  # noqa: E731
    for _ in range(3):
        multiply()
    return 2 * width**3 / bench.seconds(multiply, calls=10)


def launch_seconds(bench: Bench) -> float:
    """Return the time of an operation whose kernel costs nothing."""
    value = torch.ones(16, device=bench.device)
    value.add_(1)
    return bench.seconds(lambda: value.add_(1), calls=1000)


def _of(gpu: Gpu | None, kind: str) -> float | None:
    """Lowest rate for a GPU, in the units of the rows."""
    if gpu is None:
        return None
    if kind == "copy":
        return COPY_SHARE * gpu.memory_rate / 1e9
    return MATMUL_SHARE * gpu.peak_flops / 1e12


def _rate(name: str, value: float, unit: str, limit: float | None, meaning: str) -> Row:
    if limit is None:
        return fact(name, value, unit, note="no datasheet of this device is known here")
    return at_least(name, value, limit, meaning, unit)
