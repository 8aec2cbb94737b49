"""Groups are undone whole: their threads end, and others' groups stay."""

import os
import subprocess
import sys

SCRIPT = """
import os
import torch.distributed as dist
from megatron_sr1.config.run import ParallelConfig
from megatron_sr1.runtime.device import select_device, start_distributed
from megatron_sr1.runtime.groups import make_groups
from tests.layouts import destroy_groups

device = select_device("cpu")
start_distributed(device)
engines = dist.new_group([0])
threads = []
for _ in range(3):
    make_groups(ParallelConfig(), device)
    destroy_groups()
    threads.append(len(os.listdir("/proc/self/task")))
print("threads", len(set(threads)), "others'", dist.get_process_group_ranks(engines))
"""


def test_destroyed_groups_leave_no_thread_and_other_groups_intact():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        capture_output=True,
        text=True,
        timeout=120,
        env={name: value for name, value in os.environ.items() if name != "RANK"},
    )
    assert done.stdout.splitlines()[-1:] == ["threads 1 others' [0]"], done.stdout + done.stderr
