"""Start the ranks of a run on this machine with torchrun, or find out that we are one of them.

In: the command line of one rank and the configuration. Out: an exit status, or the environment
that makes this process a rank.
"""

from __future__ import annotations

import functools
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType

from megatron_sr1.config import LaunchConfig
from megatron_sr1.errors import ConfigError, SR1Error
from megatron_sr1.runtime.child_processes import end_with

FIRST_RANK_SECONDS = 5.0
PORT_FIRST, PORT_SPAN = 20000, 10000


def joined(environment: Mapping[str, str]) -> dict[str, str] | None:
    """Variables that make this process a rank of a world that something else started.

    Args:
        environment: of this process.

    Returns:
        {} under torchrun, whose variables are there already; the five that torch.distributed reads
        under srun with several tasks; None if nothing has started us.

    Raises:
        ConfigError: RANK without WORLD_SIZE, or a step of srun without its list of nodes.
    """
    if "RANK" in environment or "WORLD_SIZE" in environment:
        for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            if name not in environment:
                raise ConfigError(
                    f"{name} is not set although RANK or WORLD_SIZE is; start with torchrun or "
                    "srun, or unset RANK and WORLD_SIZE"
                )
        return {}
    # A batch script, too, has a SLURM_PROCID and an SLURM_NTASKS; only a step of srun has this one.
    num_tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if "SLURM_PROCID" not in environment or int(num_tasks) == 1:
        return None
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST")
    if not nodes:
        raise ConfigError("a step of srun without SLURM_STEP_NODELIST; set MASTER_ADDR and RANK")
    step = int(environment.get("SLURM_JOB_ID", "0")) + int(environment.get("SLURM_STEP_ID", "0"))
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": num_tasks,
        "LOCAL_RANK": environment.get("SLURM_LOCALID", "0"),
        "MASTER_ADDR": environment.get("MASTER_ADDR") or first_node(nodes),
        "MASTER_PORT": environment.get("MASTER_PORT") or str(PORT_FIRST + step % PORT_SPAN),
    }


@contextmanager
def first_rank_first(environment: Mapping[str, str]) -> Iterator[None]:
    """Around what fails on all ranks alike: those of a machine leave its first rank time to say it.

    torchrun, and srun with --kill-on-bad-exit, end the others when that one has left.

    Args:
        environment: of this process.
    """
    try:
        yield
    except SR1Error:
        if environment.get("LOCAL_RANK", "0") != "0":
            time.sleep(FIRST_RANK_SECONDS)
        raise


def first_node(nodes: str) -> str:
    """First host of Slurm's list, as `gpu003` of `gpu[003-006,009]-ib,login1` with its suffix."""
    match = re.match(r"([^\[,]*)(?:\[(\w+)[^\]]*\]([^,\[]*))?", nodes)
    assert match is not None
    return "".join(part for part in match.groups() if part)


def num_processes(launch: LaunchConfig) -> int:
    """Ranks to start here: as configured, else one a GPU, else one."""
    if launch.num_processes > 0:
        return launch.num_processes
    if launch.device == "cpu":
        return 1
    import torch

    return max(torch.cuda.device_count(), 1)


def rank_environment(launch: LaunchConfig, num_ranks: int) -> dict[str, str]:
    """Variables of a rank: the cores of this machine shared out unless `launch.threads` says.

    GNU's OpenMP lets its threads sleep at once when there are more of them than cores. They are as
    soon as a thread of gloo's has copied a large tensor, and then waking them costs several times
    a small kernel. So they wait a little: 1,000 spins then, 3 ms (300,000) while they are few. What
    the user has set stays.
    """
    threads = launch.threads or max(len(os.sched_getaffinity(0)) // num_ranks, 1)
    waiting = {"OMP_WAIT_POLICY": "active", "GOMP_SPINCOUNT": "300000"}
    own = {} if threads == 1 or waiting.keys() & os.environ.keys() else waiting
    return {"OMP_NUM_THREADS": str(threads), **own}


def build_command(arguments: Sequence[str], num_ranks: int) -> list[str]:
    """The command that runs `megatron-sr1 ARGUMENTS` on each of `num_ranks` ranks with torchrun.

    The rendezvous takes a free port on this machine's loopback.
    """
    return [
        *(sys.executable, "-m", "megatron_sr1.launch.ranks"),
        *("--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", str(num_ranks)),
        *("-m", "megatron_sr1", *arguments),
    ]


def run(arguments: Sequence[str], launch: LaunchConfig, num_ranks: int) -> int:
    """Run the ranks in the foreground; SIGTERM and Ctrl-C reach them, and they end when we do.

    Args:
        arguments: of `megatron-sr1`, the subcommand first.
        launch: threads a rank.
        num_ranks: ranks to start.

    Returns:
        the exit status of the first rank that failed; 128 + the signal if a signal ended it.
    """
    environment = dict(os.environ, **rank_environment(launch, num_ranks))
    command = build_command(arguments, num_ranks)
    # A launcher that is killed must not leave a run behind.
    end_with_us = functools.partial(end_with, os.getpid(), signal.SIGTERM)
    ranks = subprocess.Popen(command, env=environment, preexec_fn=end_with_us)

    def forward(number: int, frame: FrameType | None) -> None:
        ranks.send_signal(number)

    interrupts: list[int] = []
    before = signal.signal(signal.SIGTERM, forward)
    # A terminal sends Ctrl-C to the ranks as well; we wait for them to end before we raise it.
    before_interrupt = signal.signal(signal.SIGINT, lambda number, _: interrupts.append(number))
    try:
        status = ranks.wait()
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGINT, before_interrupt)
    if interrupts and status:
        raise KeyboardInterrupt
    return status if status >= 0 else 128 - status
