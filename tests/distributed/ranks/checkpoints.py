"""Save, load, convert and resume on each rank; writes what came of it.

Usage: checkpoints.py roundtrip OUT SOURCE:A,B ...    loads SOURCE under A and B, writes it to
                                                           OUT/NAME_OF_SOURCE/A and B
       checkpoints.py resave OUT SOURCE:A,B ...       the same, and saves a checkpoint under A
                                                           and B in OUT/NAME_OF_SOURCE/A.saved
       checkpoints.py resume OUT SOURCE A:B,C ...     trains and saves under A, resumes under
                                                           B and C; writes OUT/results.json
A layout is a short form of `layout_settings`.
"""

import hashlib
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_sr1.checkpoint.folders import resolve_model
from megatron_sr1.checkpoint.hf import save_hf
from megatron_sr1.checkpoint.loading import load_checkpoint, load_model
from megatron_sr1.checkpoint.saving import SaveQueue, begin_save
from megatron_sr1.checkpoint.tensors import Trained
from megatron_sr1.config.loading import load_config
from megatron_sr1.config.training import CheckpointConfig
from megatron_sr1.data.processor import Processor
from megatron_sr1.model.hf_config import read_hf_config
from megatron_sr1.model.qwen25_vl import build_model
from megatron_sr1.runtime import cpu
from megatron_sr1.runtime.device import select_device, start_distributed
from megatron_sr1.runtime.groups import make_groups
from megatron_sr1.runtime.rng import seed_everything
from megatron_sr1.trainer.actor import make_actor
from megatron_sr1.trainer.step import update
from tests.layouts import destroy_groups, layout_settings, pack_rows, random_samples


def start(layout, source):
    """Configuration and groups of a layout; the groups of the one before go."""
    settings = ["optimizer.learning_rate=1e-3", "optimizer.schedule=linear"]
    settings += ["optimizer.warmup_steps=3", f"model.path={source}"]
    config = load_config(None, [*layout_settings(layout), *settings])
    destroy_groups()
    groups = make_groups(config.parallel, select_device("cpu"))
    seed_everything(1, groups)
    return config, groups


def load(config, groups):
    source = resolve_model(config.model.path)
    hf_config = read_hf_config(source.hf_files)
    with cpu.megatron_mode():
        chunks = build_model(hf_config, groups, config.model, config.parallel)
    load_model(chunks, source, hf_config, groups, verify=True)
    return chunks, hf_config, source


def roundtrip(out, *plans, resave=False):
    for plan in plans:
        source, layouts = plan.split(":")
        for layout in layouts.split(","):
            config, groups = start(layout, source)
            chunks, hf_config, found = load(config, groups)
            to = out / Path(source).name / layout
            save_hf(chunks, hf_config, groups, found.hf_files, to)
            if resave:
                to, model = to.with_name(f"{layout}.saved"), Trained(chunks, None, None, groups)
                begin_save(to, 0, model, {}, source_directory=found.hf_files).finish()


def resave(out, *plans):
    roundtrip(out, *plans, resave=True)


def make_batches(processor, groups, row_budget):
    """Six random sequences, every other one with an image, in packed rows."""
    images = [[(84, 56)] if index % 2 else [] for index in range(6)]
    samples, pictures = random_samples(processor, images, [12 + index for index in range(6)])
    return pack_rows(samples, pictures, processor, groups, row_budget)


def nll(logprobs, batch):
    loss, num_tokens = -(logprobs * batch.loss_mask).sum(), batch.loss_mask.sum().int()
    return loss, num_tokens, {"loss": (loss.detach(), num_tokens)}


class Run:
    """A short training run under a layout."""

    def __init__(self, layout, source, processor):
        config, self.groups = start(layout, source)
        chunks, hf_config, found = load(config, self.groups)
        self.actor = make_actor(config, chunks, hf_config, found, self.groups, num_updates=6)
        self.batches = make_batches(processor, self.groups, 64)

    def updates(self, number):
        return [update(self.actor, self.batches, nll, 1.0) for _ in range(number)]

    def numbers(self):
        """Two updates, a random draw, and the weights after them."""
        draw = [None] * dist.get_world_size()
        dist.all_gather_object(draw, torch.rand(2).tolist())
        updates = self.updates(2)
        weights = {name: tensor.float().numpy() for name, tensor in self.actor.weights()}
        digest = hashlib.sha256(b"".join(w.tobytes() for w in weights.values())).hexdigest()
        norms = {name: float(abs(w.astype("f8")).sum()) for name, w in weights.items()}
        return {"draw": draw, "updates": updates, "digest": digest, "norms": norms}


def resume(out, source, *plans):
    processor = Processor(source, 784, 200704)
    results = {}
    for plan in plans:
        saving, others = plan.split(":")
        run = Run(saving, source, processor)
        run.updates(2)
        torch.rand(3 + dist.get_rank())  # generators that differ by rank
        for step in (1, 2):
            saves = SaveQueue(out / saving, CheckpointConfig(keep_last=1))
            saves.add(step, run.actor.trained, {"cursor": [2, 5]}, source)
        results[saving] = run.numbers()
        for layout in others.split(","):
            run = Run(layout, source, processor)
            state = load_checkpoint(out / saving, run.actor.trained)
            results[f"{saving} to {layout}"] = {"state": state, **run.numbers()}
    if dist.get_rank() == 0:
        (out / "results.json").write_text(json.dumps(results))


def main():
    way, out, *rest = sys.argv[1:]
    start_distributed(select_device("cpu"), 120)
    {"roundtrip": roundtrip, "resave": resave, "resume": resume}[way](Path(out), *rest)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
