"""Device and start of a rank: one decision, and a process that starts alone stays alone."""

import json
import os
import subprocess
import sys

import pytest

NEXT_TO_A_GPU = """
import json, os, sys
import torch
torch.cuda.is_available, torch.cuda.device_count = (lambda: True), (lambda: 1)
from megatron_sr1.config.run import ModelConfig, ParallelConfig
from megatron_sr1.model.qwen25_vl import build_model
from megatron_sr1.model.hf_config import read_hf_config
from megatron_sr1.runtime.device import select_device, start_distributed, stop_distributed
from megatron_sr1.runtime.groups import make_groups
device = select_device("cpu")
found = {"hidden": os.environ.get("CUDA_VISIBLE_DEVICES") == ""}
found["sees"] = [torch.cuda.is_available(), torch.cuda.device_count()]
before = dict(os.environ)
start_distributed(device, 60)
found["world"] = [torch.distributed.get_rank(), torch.distributed.get_world_size()]
found["added"] = sorted(set(os.environ.items()) ^ set(before.items()))
groups = make_groups(ParallelConfig(), device)
model = ModelConfig(dtype="float32")
(chunk,) = build_model(read_hf_config(sys.argv[1]), groups, model, ParallelConfig())
torch.set_num_threads(2)
found["tiny"] = [(torch.full((size,), 1e-39) * 1.0).max().item() for size in (1, 2**20)]
found["devices"] = sorted({tensor.device.type for tensor in chunk.parameters()})
stop_distributed()
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(tiny_model):
    """What a process finds that starts alone with the device cpu where torch sees a GPU."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    names += ("CUDA_VISIBLE_DEVICES",)
    environment = {k: v for k, v in os.environ.items() if k not in names}
    command = [sys.executable, "-c", NEXT_TO_A_GPU, str(tiny_model)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.field
def test_a_rank_on_the_cpu_sees_no_gpu_and_megatron_allocates_none(found):
    """With this CPU build of torch, whatever asks a GPU for memory raises."""
    assert found["hidden"] and found["sees"] == [False, 0]
    assert found["devices"] == ["cpu"]


def test_a_world_of_one_leaves_the_environment_as_it_was(found):
    assert found["world"] == [0, 1] and found["added"] == []


def test_no_thread_of_a_rank_on_the_cpu_computes_with_denormals(found):
    assert found["tiny"] == [0.0, 0.0]
