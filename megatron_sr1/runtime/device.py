"""The switch between CPU with gloo and CUDA with NCCL, and the start of torch.distributed.

`select_device` decides. All other code, Megatron-Core and the engine included, calls
`torch.cuda.is_available()`, which returns False once the CPU has been selected.
"""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from typing import Any

import numpy as np
import torch

from megatron_sr1.errors import ConfigError


def select_device(kind: str = "auto") -> torch.device:
    """Select the device of this rank: auto, cpu (which sees no GPU) or cuda (`LOCAL_RANK`'s GPU).

    Raise a ConfigError if there is no GPU for cuda, or fewer GPUs than local ranks.
    """
    if kind == "cpu" or (kind == "auto" and not torch.cuda.is_available()):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # for child processes, and CUDA if not loaded yet
        if torch.cuda.is_available():  # CUDA has already read the variable
            torch.cuda.is_available = lambda: False
            torch.cuda.device_count = lambda: 0  # type: ignore[assignment]
        # Gradients of a sure policy's logits are full of denormals, with which a product takes up
        # to 70 times as long. Threads that start later inherit this. NumPy, which warns of it,
        # looks once.
        np.finfo(np.float32), np.finfo(np.float64)
        torch.set_flush_denormal(True)
        return torch.device("cpu")
    if not torch.cuda.is_available():
        advice = "use launch.device=cpu or auto"
        raise ConfigError(f"launch.device=cuda, but torch sees no GPU; {advice}")
    index, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if index >= gpus:
        advice = "start at most one process per GPU (launch.num_processes)"
        raise ConfigError(f"local rank {index} has no GPU: torch sees {gpus}; {advice}")
    return torch.device("cuda", index)


def start_distributed(device: torch.device, timeout_seconds: float = 1800.0) -> None:
    """Start torch.distributed from the environment; without `RANK`, as a world of one rank.

    On GPUs it uses both NCCL and, for objects in host memory, gloo.
    """
    if torch.distributed.is_initialized():
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    alone: dict[str, Any] = {}
    if "RANK" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        # Not through the environment: a child process would believe that it is a rank.
        alone = {"init_method": f"tcp://127.0.0.1:{port}", "rank": 0, "world_size": 1}
    torch.distributed.init_process_group(
        backend="gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl",
        timeout=timedelta(seconds=timeout_seconds),
        **alone,
    )


def stop_distributed() -> None:
    """Destroy all process groups, Megatron's included, if there are any."""
    if not torch.distributed.is_initialized():
        return
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()
