"""Run a script on several ranks of one machine, as torchrun does, without importing torch anew.

Ranks are forked from a process that has imported the libraries (multiprocessing's fork server,
started once for all tests of a process). A script imports what it needs at its top, and is run as
`__main__` with the CPU mode of Megatron-Core switched on before.
"""

import contextlib
import ctypes
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from multiprocessing.connection import wait
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run_ranks(script, num_ranks, arguments, timeout) -> subprocess.CompletedProcess:
    """Run a script on ranks until all have ended or one has failed, which ends the others.

    Returns:
        exit status of the rank that failed first, 0 if none did; all output of all ranks. The
        status of a rank that was still running after `timeout` seconds is -9.
    """
    command = [str(script), *map(str, arguments)]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "tests.ranks_libraries"])
    (port,) = free_ports(1)
    with tempfile.NamedTemporaryFile("r", errors="replace") as log:
        ranks = []
        for rank in range(num_ranks):
            environment = os.environ | rank_variables(rank, num_ranks, port)
            ranks.append(context.Process(target=_run_rank, args=(command, environment, log.name)))
        with contextlib.chdir(ROOT):  # the fork server finds tests/ from here
            for process in ranks:
                process.start()
        status = _wait_for(ranks, time.monotonic() + timeout)
        return subprocess.CompletedProcess(command, status, log.read())


def free_ports(number: int) -> list[int]:
    """Ports of the loopback interface that nobody uses."""
    with contextlib.ExitStack() as stack:
        servers = [
            stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(number)
        ]
        return [server.getsockname()[1] for server in servers]


def rank_variables(rank: int, num_ranks: int, port: int) -> dict[str, str]:
    """The variables that torchrun sets for a rank."""
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks}
    variables |= {"LOCAL_WORLD_SIZE": num_ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {name: str(value) for name, value in variables.items()}


def _wait_for(ranks, deadline) -> int:
    left = list(ranks)
    while left and wait([rank.sentinel for rank in left], max(0, deadline - time.monotonic())):
        for rank in [rank for rank in left if not rank.is_alive()]:
            left.remove(rank)
            if rank.exitcode:
                return _kill(left, rank.exitcode)
    return _kill(left, -9) if left else 0


def _kill(ranks, status) -> int:
    for rank in ranks:
        rank.kill()
        rank.join()
    return status


def _run_rank(command, environment, log):
    """Become a rank: its variables, its output, its script."""
    os.environ.clear()
    os.environ.update(environment)
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(ROOT)
    sys.argv = command
    sys.path.insert(0, str(Path(command[0]).parent))
    status = 1
    try:
        runpy.run_path(command[0], run_name="__main__")
        status = 0
    except SystemExit as left:
        status = left.code if isinstance(left.code, int) else int(left.code is not None)
    except BaseException:
        traceback.print_exc()
    # The end of a whole interpreter: vLLM's shared memory is removed by a destructor in C++.
    ctypes.pythonapi.Py_Exit(status)
