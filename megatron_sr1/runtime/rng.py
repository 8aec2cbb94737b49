"""Random number generators: seeding, saving and restoring their state.

One seed determines all randomness. The seed of an engine request does not depend on the order of
requests in a batch.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from megatron_sr1.runtime import cpu
from megatron_sr1.runtime.groups import Groups


def rng_state() -> dict[str, Any]:
    """Return the states of Python, NumPy, torch and Megatron's tensor-parallel regions.

    They are tensors, numbers and strings only, so that `torch.load(weights_only=True)` reads them.
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
def preserve_rng_and_threads() -> Iterator[None]:
    """Restore all generators, and torch's number of threads and its setter, on leaving.

    vLLM seeds the generators when it starts, and replaces `torch.set_num_threads` on a CPU.
    """
    state = rng_state()
    set_num_threads, num_threads = torch.set_num_threads, torch.get_num_threads()
    try:
        yield
    finally:
        restore_rng(state)
        torch.set_num_threads = set_num_threads
        torch.set_num_threads(num_threads)


def seed_everything(seed: int, groups: Groups) -> None:
    """Seed Python, NumPy, torch and Megatron's tensor-parallel regions.

    Pipeline stages differ; data-parallel ranks agree, as they hold the same weights.
    """
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    stage_seed = seed + 100 * groups.pipeline.rank
    random.seed(stage_seed)
    np.random.seed(stage_seed % 2**32)
    torch.manual_seed(stage_seed)
    with cpu.megatron_mode():
        model_parallel_cuda_manual_seed(stage_seed)


def request_seed(seed: int, step: int, index: int, sample: int, part: int = 1) -> int:
    """Derive the seed of an engine request, in [0, 2**31), from what is requested, not from when.

    `index` is the example's, `sample` that of the response to its prompt, `part` the pass, 1 or 2.
    """
    text = f"{seed}/{step}/{index}/{sample}/{part}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "big") >> 1
