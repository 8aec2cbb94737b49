"""Groups have the time limit that they are given, and are undone whole; rows of all their ranks."""

import os
import subprocess
import sys

import pytest

from megatron_sr1.config.run import LaunchConfig

SCRIPT = """
import os
import torch.distributed as dist
from megatron.core import parallel_state
from megatron_sr1.config.run import ParallelConfig
from megatron_sr1.runtime.device import select_device, start_distributed
from megatron_sr1.runtime.groups import make_groups
from tests.layouts import destroy_groups

device = select_device("cpu")
start_distributed(device)
engines = dist.new_group([0])
threads = []
for _ in range(3):
    make_groups(ParallelConfig(), device, timeout_seconds=7777.0)
    made = [group for group in parallel_state._global_process_group_list if group is not None]
    # The experts' gloo group keeps torch's limit, and is not used: there are no experts.
    made = [group for group in made if group.group_desc != "EXPERT_DATA_PARALLEL_GROUP_GLOO"]
    limits = {group._get_backend(device).options._timeout.total_seconds() for group in made}
    assert len(made) > 5
    destroy_groups()
    threads.append(len(os.listdir("/proc/self/task")))
print("limits", limits)
print("threads", len(set(threads)), "others'", dist.get_process_group_ranks(engines))
"""

ROWS = """
import sys
import torch.distributed as dist
from megatron_sr1.runtime.groups import Group, gather_rows

rank, file = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=3)
own = [[(7, 0, 2**40), (5, -1, rank)], [], [(0, 3, 9), (2, 2, 2), (4, 4, 4)]][rank]
print(gather_rows(own, (3, 3), Group.of(dist.group.WORLD)))
"""


@pytest.fixture(scope="module")
def printed():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        capture_output=True,
        text=True,
        timeout=120,
        env={name: value for name, value in os.environ.items() if name != "RANK"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()[-2:]


def test_destroyed_groups_leave_no_thread_and_other_groups_intact(printed):
    assert printed[1] == "threads 1 others' [0]"


def test_all_of_megatrons_groups_have_the_time_limit(printed):
    """Not Megatron's own, 30 minutes, which is below the deadline of a phase."""
    assert printed[0] == "limits {7777.0}"


def test_collectives_may_take_longer_than_every_phase():
    assert LaunchConfig().collective_timeout_seconds > LaunchConfig().phase_deadline_seconds
    longer = LaunchConfig(setup_deadline_seconds=9000.0, phase_deadline_seconds=60.0)
    assert longer.collective_timeout_seconds > 9000.0
    for unlimited in ("setup_deadline_seconds", "phase_deadline_seconds"):
        assert LaunchConfig(**{unlimited: 0.0}).collective_timeout_seconds >= 30 * 86400


def test_rows_are_gathered_in_the_order_of_ranks_which_may_have_none(tmp_path):
    command = [sys.executable, "-c", ROWS]
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store")], stdout=subprocess.PIPE)
        for rank in range(3)
    ]
    found = [rank.communicate(timeout=120)[0].decode() for rank in ranks]
    expected = [[7, 0, 2**40], [5, -1, 0], [0, 3, 9], [2, 2, 2], [4, 4, 4]]
    assert found == [f"{expected}\n"] * 3
