"""The random number generators of a rank as tensors and plain values, and back."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from megatron_sr1.runtime import cpu


def rng_state() -> dict[str, Any]:
    """States of Python, NumPy, torch and Megatron's tensor-parallel regions.

    Returns:
        tensors, numbers and strings only, so that `torch.load(weights_only=True)` reads it.
    """
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    name, keys, *rest = np.random.get_state()
    with cpu.megatron_mode():
        regions = dict(get_cuda_rng_tracker().get_states())
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys, np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "regions": {key: value for key, value in regions.items() if torch.is_tensor(value)},
    }


def restore_rng(state: dict[str, Any]) -> None:
    """Set all generators to a saved state."""
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    if state["regions"]:
        with cpu.megatron_mode():
            get_cuda_rng_tracker().set_states(state["regions"])


@contextlib.contextmanager
def kept_rng() -> Iterator[None]:
    """Around what seeds generators for itself: afterwards they stand where they stood."""
    state = rng_state()
    try:
        yield
    finally:
        restore_rng(state)
