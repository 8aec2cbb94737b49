"""Seeds: one number makes all randomness, and requests do not depend on batch order."""

from __future__ import annotations

import hashlib
import random

import numpy as np
import torch

from megatron_sr1.runtime import cpu
from megatron_sr1.runtime.groups import Groups


def seed_everything(seed: int, groups: Groups) -> None:
    """Seed Python, NumPy, torch and Megatron's tensor-parallel regions.

    Pipeline stages differ; data-parallel ranks agree, as they hold the same weights.
    """
    stage_seed = seed + 100 * groups.pipeline.rank
    random.seed(stage_seed)
    np.random.seed(stage_seed % 2**32)
    torch.manual_seed(stage_seed)
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    with cpu.megatron_mode():
        model_parallel_cuda_manual_seed(stage_seed)


def request_seed(seed: int, step: int, index: int, sample: int, part: int = 1) -> int:
    """Seed of one engine request, from what it is and not from when it runs.

    Args:
        seed: of the run.
        step: training step.
        index: of the example.
        sample: number k of the response.
        part: 1 or 2, the pass.

    Returns:
        a number in [0, 2**31).
    """
    text = f"{seed}/{step}/{index}/{sample}/{part}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "big") >> 1
