"""The model's parameters on a rank of a layout, from Megatron's own classes, without any memory.

In: a configuration, a model's shape, a rank. Out: the number of its parameters. The classes are
built on torch's meta device, in a world whose other ranks do not exist (torch's backend "fake",
which talks to nobody), so layers that do not divide, or settings that Megatron refuses, show up
before a GPU is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.distributed as dist

from megatron_sr1.config.model import ParallelConfig
from megatron_sr1.config.run import Config
from megatron_sr1.model.hf_config import HFConfig
from megatron_sr1.model.qwen25_vl import build_model
from megatron_sr1.runtime.device import Device, stop_distributed
from megatron_sr1.runtime.groups import Groups, make_groups


def num_parameters_on(config: Config, hf_config: HFConfig, rank: int, num_ranks: int) -> int:
    """Parameters of one rank, padding of the vocabulary included, a tied one once a stage.

    With this package's kernels, also where the configuration names Transformer Engine's, which
    cannot be imported everywhere and hold the same parameters.

    Args:
        config: of the run.
        hf_config: shape of the model.
        rank: of the world.
        num_ranks: of the world.

    Raises:
        ConfigError: the layout does not divide the model or the ranks.
    """
    with _alone_in_a_world(config.parallel, rank, num_ranks) as groups, torch.device("meta"):
        shape = replace(config.model, spec="local", fp8=None)
        chunks = build_model(hf_config, groups, shape, config.parallel)
        return sum(p.numel() for chunk in chunks for p in chunk.parameters())


@contextmanager
def _alone_in_a_world(parallel: ParallelConfig, rank: int, num_ranks: int) -> Iterator[Groups]:
    """Groups as `rank` would have them."""
    # Registers the backend; torch has no public place for it.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    assert not dist.is_initialized(), "a rank of a real world cannot be one of another"
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=num_ranks)
    try:
        yield make_groups(parallel, Device("cpu"), on_host=False)
    finally:
        stop_distributed()
