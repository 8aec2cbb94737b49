"""A process that starts alone stays alone: nothing makes its children ranks of it."""

import os
import subprocess
import sys

ALONE = """
import os
from megatron_sr1.runtime.device import select_device, start_distributed, stop_distributed
before = dict(os.environ)
start_distributed(select_device("cpu"), 60)
import torch.distributed as dist
assert (dist.get_rank(), dist.get_world_size()) == (0, 1)
assert dict(os.environ) == before, set(os.environ) - set(before)
stop_distributed()
"""


def test_a_world_of_one_leaves_the_environment_as_it_was():
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {k: v for k, v in os.environ.items() if k not in names}
    done = subprocess.run([sys.executable, "-c", ALONE], env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
