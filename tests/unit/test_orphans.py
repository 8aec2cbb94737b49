"""Processes that a rank started end with it, whatever ends it."""

import signal
import subprocess
import sys

import psutil
import pytest

PROGRAM = """
import signal, sys, time
import psutil

if __name__ == "__main__":
    import torch
    from megatron_sr1.runtime import cpu, orphans
    from megatron_sr1.runtime.failure import guard
    cpu.install()
    orphans.install()
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    makers = vars(filesystem_async).get
    queue = (makers("_get_write_results_queue") or makers("get_write_results_queue"))()
    queue.put(torch.Size([1]))
    assert queue.get_nowait() == torch.Size([1])
    with guard(sys.argv[1]):
        print(*(child.pid for child in psutil.Process().children()), flush=True)
        time.sleep(300)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_megatrons_result_manager_ends_with_its_rank(tmp_path, number):
    program = tmp_path / "rank.py"
    program.write_text(PROGRAM)
    command = [sys.executable, str(program), str(tmp_path / "run")]
    rank = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    children = [psutil.Process(int(pid)) for pid in rank.stdout.readline().split()]
    (manager,) = (child for child in children if "spawn_main" in " ".join(child.cmdline()))
    assert not any("libtorch" in place.path for place in manager.memory_maps())
    rank.send_signal(number)
    rank.wait(timeout=60)
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive
