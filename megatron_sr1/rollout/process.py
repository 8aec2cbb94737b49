"""What the engine needs of the process that it shares with the trainer: rank and environment."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megatron_sr1.errors import EngineError


def place(tensor_parallel: int) -> tuple[int, int]:
    """Return this process's rank and the world size.

    Raises:
        EngineError: no process group, or `tensor_parallel` does not divide the world size.
    """
    if not torch.distributed.is_initialized():
        raise EngineError(
            "the engine needs torch.distributed: call runtime.device.start_distributed first"
        )
    world = torch.distributed.get_world_size()
    if world % tensor_parallel:
        raise EngineError(
            f"rollout.tensor_parallel={tensor_parallel} does not divide the {world} ranks"
        )
    return torch.distributed.get_rank(), world


def set_environment(kv_cache_gib: int) -> None:
    """Set the variables that vLLM reads when it is imported."""
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_USE_V2_MODEL_RUNNER="0",
        VLLM_CPU_KVCACHE_SPACE=str(kv_cache_gib),
        VLLM_CPU_OMP_THREADS_BIND="nobind",
        VLLM_NO_USAGE_STATS="1",
    )
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")


@contextmanager
def launcher_variables() -> Iterator[None]:
    """Set a launcher's variables while the engine starts, unless a launcher has set them.

    vLLM reads the rank from the environment even if the process group is already initialized.
    """
    variables = {"LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    variables["RANK"] = str(torch.distributed.get_rank())
    added = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]
