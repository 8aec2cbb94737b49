"""Saves in the background on two ranks; writes what each rank saw.

Usage: background_saves.py OUT SOURCE
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch.distributed as dist

from megatron_sr1.checkpoint import tensors
from megatron_sr1.checkpoint.folders import steps
from megatron_sr1.checkpoint.loading import load_checkpoint
from megatron_sr1.checkpoint.saving import begin_save
from megatron_sr1.data.processor import Processor
from megatron_sr1.errors import CheckpointError
from megatron_sr1.runtime.device import select_device, start_distributed
from tests.distributed.ranks.checkpoints import Run

LAYOUT = "2x1x1"


def hold_rank_1(gate):
    """From now on the writer of rank 1 waits for a file before its last deed."""
    measure, rank = tensors.measure, dist.get_rank()

    def measure_behind_the_gate(path):
        while rank == 1 and not gate.exists():
            time.sleep(0.01)
        return measure(path)

    tensors.measure = measure_behind_the_gate


def main():
    out, source = Path(sys.argv[1]), sys.argv[2]
    start_distributed(select_device("cpu"), 120)
    processor, gate = Processor(source, 784, 200704), out / "gate"
    run, rank = Run(LAYOUT, source, processor), dist.get_rank()
    run.updates(1)
    begin_save(out / "plain", 1, run.actor.trained, {}).finish()
    hold_rank_1(gate)
    pending = begin_save(out / "background", 1, run.actor.trained, {}, in_background=True)
    seen = {"trained": run.updates(2), "before": steps(out / "background")}
    if rank == 0:
        while not pending.tensors.is_done:
            time.sleep(0.01)
    seen["done"] = pending.tensors.is_done
    dist.barrier()
    gate.touch()
    pending.finish()
    seen["after"] = steps(out / "background")

    gate.unlink(missing_ok=True)
    dist.barrier()
    pending = begin_save(out / "background", 2, run.actor.trained, {}, in_background=True)
    if rank == 1:
        os.kill(pending.tensors._process.pid, signal.SIGKILL)
    try:
        pending.finish()
    except CheckpointError as error:
        seen["told"] = str(error)
    seen["left"] = sorted(p.name for p in (out / "background").iterdir())
    dist.barrier()
    again = Run(LAYOUT, source, processor)
    load_checkpoint(out / "background", again.actor.trained)
    seen["again"] = again.updates(2)
    (out / f"rank_{rank}.json").write_text(json.dumps(seen))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
