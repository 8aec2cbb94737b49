"""Device and start of a rank: one decision, and a process that starts alone stays alone."""

import os
import subprocess
import sys

import pytest

ALONE = """
import os
from megatron_sr1.runtime.device import select_device, start_distributed, stop_distributed
device = select_device("cpu")
before = dict(os.environ)
start_distributed(device, 60)
import torch.distributed as dist
assert (dist.get_rank(), dist.get_world_size()) == (0, 1)
assert dict(os.environ) == before, set(os.environ) - set(before)
stop_distributed()
"""

NEXT_TO_A_GPU = """
import os, sys
import torch
torch.cuda.is_available, torch.cuda.device_count = (lambda: True), (lambda: 1)
from megatron_sr1.config import ParallelConfig
from megatron_sr1.model.build import build_model
from megatron_sr1.model.hf_config import read_hf_config
from megatron_sr1.runtime.device import select_device, start_distributed
from megatron_sr1.runtime.groups import make_groups
device = select_device("cpu")
assert not torch.cuda.is_available() and torch.cuda.device_count() == 0
assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
start_distributed(device, 60)
groups = make_groups(ParallelConfig(), device)
(chunk,) = build_model(read_hf_config(sys.argv[1]), groups, dtype=torch.float32, spec="local")
tensors = [*chunk.parameters(), *chunk.buffers()]
assert {tensor.device.type for tensor in tensors} == {"cpu"}, len(tensors)
"""


@pytest.mark.field
def test_a_rank_that_was_told_cpu_sees_no_gpu(tiny_model):
    """With the original torch of a CPU build, whatever is asked of a GPU raises."""
    environment = {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"}
    command = [sys.executable, "-c", NEXT_TO_A_GPU, str(tiny_model)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_world_of_one_leaves_the_environment_as_it_was():
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {k: v for k, v in os.environ.items() if k not in names}
    done = subprocess.run([sys.executable, "-c", ALONE], env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
