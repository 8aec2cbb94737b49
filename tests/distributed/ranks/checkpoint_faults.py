"""Saves and loads that go wrong, on each rank; writes what each rank was told.

Usage: checkpoint_faults.py OUT SOURCE
"""

import json
import resource
import sys
from pathlib import Path

import torch.distributed as dist

from megatron_sr1.checkpoint import disk, saving, tensors
from megatron_sr1.config.run import ParallelConfig
from megatron_sr1.errors import CheckpointError
from megatron_sr1.runtime.device import select_device, start_distributed
from megatron_sr1.runtime.groups import make_groups
from tests.checkpoint_run import fill, held, load, make_run, save


def told(work):
    """What a rank's error said; None if it went through."""
    try:
        work()
    except CheckpointError as error:
        return str(error)
    return None


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def main():
    out, source = Path(sys.argv[1]), sys.argv[2]
    device = select_device("cpu")
    start_distributed(device, 120)
    groups = make_groups(ParallelConfig(tensor=2), device)
    rank, folder = groups.world.rank, out / "checkpoints"
    actor = make_run(source, groups)
    measured, plain = [], disk.measure

    def note(path, **more):
        measured.append(Path(path).name)
        return plain(path, **more)

    for module in (disk, saving, tensors):
        module.measure = note
    fill(actor, 2)
    save(actor, groups, folder, 2, source)
    results = {"hashed": list(measured)}
    measured.clear()
    load(actor, groups, folder)
    results["read"] = list(measured)
    if rank == 1:  # of one rank's own files and of one that rank 0 writes
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    results["save"] = told(lambda: save(actor, groups, folder, 4, source))
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    results["left"] = sorted(p.name for p in folder.iterdir())
    dist.barrier()
    fill(actor, 4)
    results["again"] = told(lambda: save(actor, groups, folder, 4, source))
    load(actor, groups, folder)
    results["held"] = held(actor)
    if rank == 0:
        flip(folder / "step_4" / "__1_0.distcp")
        (folder / "step_4" / "rng_1.pt").unlink()
    dist.barrier()
    results["load"] = told(lambda: load(actor, groups, folder))
    (out / f"rank_{rank}.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
