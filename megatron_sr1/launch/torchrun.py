"""Start the ranks of a run on this machine with torchrun, or detect that this process is a rank.

Run as a module, this file is torchrun without its error report, a traceback of its own frames and a
table: the ranks have already reported why they failed.
"""

from __future__ import annotations

import functools
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from megatron_sr1.errors import ConfigError, SR1Error
from megatron_sr1.runtime.signals import end_with

if TYPE_CHECKING:
    from megatron_sr1.config.run import Config, LaunchConfig

SHUTDOWN_SECONDS = str(7 * 86400)
"""From SIGTERM to SIGKILL, 30 by default in torchrun; saving ranks have their own deadlines."""
FIRST_RANK_SECONDS = 5.0
PORT_FIRST, PORT_SPAN = 20000, 10000
QUEUES = "CUDA_DEVICE_MAX_CONNECTIONS"
HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"
"""Read by torch: c10/core/impl/alloc_cpu.cpp."""


def joined(environment: Mapping[str, str]) -> dict[str, str] | None:
    """Return the missing variables of a rank if a launcher started this process, otherwise None.

    None are missing under torchrun; under srun with several tasks, the five that torch.distributed
    reads. An incomplete environment is a ConfigError.
    """
    if "RANK" in environment or "WORLD_SIZE" in environment:
        for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            if name not in environment:
                advice = "start with torchrun or srun, or unset RANK and WORLD_SIZE"
                raise ConfigError(f"{name} is not set although RANK or WORLD_SIZE is; {advice}")
        return {}
    # A batch script has SLURM_PROCID and SLURM_NTASKS, too; only an srun step has this one.
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


def join() -> bool:
    """Return True if a launcher started this process as a rank, with its variables set."""
    variables = joined(os.environ)
    os.environ.update(variables or {})
    return variables is not None


def first_node(nodes: str) -> str:
    """Return the first host of Slurm's list: `gpu003-ib` of `gpu[003-006,009]-ib,login1`."""
    match = re.match(r"([^\[,]*)(?:\[(\w+)[^\]]*\]([^,\[]*))?", nodes)
    assert match is not None
    return "".join(part for part in match.groups() if part)


@contextmanager
def first_rank_first() -> Iterator[None]:
    """Let each machine's first rank report an error that all ranks raise; the others wait.

    torchrun, and srun with --kill-on-bad-exit, stop the others once the first one has exited.
    """
    try:
        yield
    except SR1Error:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(FIRST_RANK_SECONDS)
        raise


def num_processes(launch: LaunchConfig) -> int:
    """Return the number of ranks to start: as configured, else one per GPU, else one."""
    if launch.num_processes > 0:
        return launch.num_processes
    if launch.device == "cpu":
        return 1
    import torch

    return max(torch.cuda.device_count(), 1)


def rank_environment(launch: LaunchConfig, num_ranks: int) -> dict[str, str]:
    """Return a rank's environment variables: by default this machine's cores are divided evenly.

    GNU's OpenMP puts its threads to sleep at once if there are more of them than cores, which is
    the case as soon as a thread of gloo has copied a large tensor. Waking them takes several times
    as long as a small kernel. With these variables they spin first: 1,000 times then, and 300,000
    times (3 ms) otherwise. On a CPU, torch uses huge pages for large tensors, which every layer
    allocates again. Variables that the user has set are kept, except the number of threads.
    """
    threads = launch.threads or max(len(os.sched_getaffinity(0)) // num_ranks, 1)
    waiting = {"OMP_WAIT_POLICY": "active", "GOMP_SPINCOUNT": "300000"}
    own = {} if threads == 1 or waiting.keys() & os.environ.keys() else waiting
    if launch.device == "cpu" and HUGE_PAGES not in os.environ:
        own = {**own, HUGE_PAGES: "1"}
    return {"OMP_NUM_THREADS": str(threads), **own}


def cuda_environment(config: Config) -> dict[str, str]:
    """Return the environment variables that CUDA reads when it starts in a rank.

    Where Megatron sends activations between ranks beside matrix products, it relies on a single
    queue to the GPU for their order. A value that the user has set is kept.
    """
    if config.launch.device == "cpu":
        return {"CUDA_VISIBLE_DEVICES": ""}
    communicates = config.parallel.tensor > 1 or config.parallel.context > 1
    if config.stage == "eval" or not communicates or QUEUES in os.environ:
        return {}
    return {QUEUES: "1"}


def build_command(arguments: Sequence[str], num_ranks: int) -> list[str]:
    """Build the torchrun command of `megatron-sr1 ARGUMENTS`, with a free port on loopback."""
    return [
        *(sys.executable, "-m", "megatron_sr1.launch.torchrun"),
        *("--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", str(num_ranks)),
        *("-m", "megatron_sr1", *arguments),
    ]


def run(arguments: Sequence[str], launch: LaunchConfig, num_ranks: int) -> int:
    """Run `megatron-sr1 ARGUMENTS` on ranks, which receive SIGTERM and end with this process.

    Return the exit status of the first rank that failed; 128 + the signal if a signal ended it.
    """
    environment = dict(os.environ, **rank_environment(launch, num_ranks))
    if launch.save_on_sigterm:
        environment.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", SHUTDOWN_SECONDS)
    # A launcher that is killed must not leave a run behind.
    end_with_us = functools.partial(end_with, os.getpid(), signal.SIGTERM)
    command = build_command(arguments, num_ranks)
    ranks = subprocess.Popen(command, env=environment, preexec_fn=end_with_us)
    interrupts: list[int] = []
    before = {
        signal.SIGTERM: signal.signal(signal.SIGTERM, lambda number, _: ranks.send_signal(number)),
        # A terminal sends Ctrl-C to the ranks as well; wait for them to end before raising it.
        signal.SIGINT: signal.signal(signal.SIGINT, lambda number, _: interrupts.append(number)),
    }
    try:
        status = ranks.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if interrupts and status:
        raise KeyboardInterrupt
    return status if status >= 0 else 128 - status


def main(arguments: Sequence[str]) -> int:
    """Be torchrun: start the ranks, wait for them and return the exit status, as `run` does."""
    from torch.distributed import run as elastic
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.disable(logging.ERROR)  # how it stops which rank; exceptions are still shown
    try:
        elastic.main(list(arguments))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode >= 0:
            return failure.exitcode
        sys.stderr.write(f"megatron-sr1: rank {rank} was ended by {failure.signal_name()}\n")
        return 128 - failure.exitcode
    except SignalException as error:
        return 128 + error.sigval
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:  # torch is still being imported
        sys.exit(130)
