"""Save, load, convert and resume on each rank; writes what came of it.

Usage: checkpoint_ranks.py roundtrip OUT SOURCE:A,B ...    loads SOURCE under A and B, writes it to
                                                           OUT/NAME_OF_SOURCE/A and B
       checkpoint_ranks.py resave OUT SOURCE:A,B ...       the same, and saves a checkpoint under A
                                                           and B in OUT/NAME_OF_SOURCE/A.saved
       checkpoint_ranks.py resume OUT SOURCE A:B,C ...     trains and saves under A, resumes under
                                                           B and C; writes OUT/results.json
A layout is TPxPP and letters: c two context-parallel ranks, s sequence parallel, i the tower by
images, v two virtual stages, u one and three layers, p optimizer not distributed, b bfloat16.
"""

import hashlib
import json
import re
import sys
from pathlib import Path

from megatron_sr1.runtime import cpu

cpu.install()

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from PIL import Image  # noqa: E402

from megatron_sr1.checkpoint.folders import resolve_model  # noqa: E402
from megatron_sr1.checkpoint.hf import save_hf  # noqa: E402
from megatron_sr1.checkpoint.loading import load_checkpoint, load_model  # noqa: E402
from megatron_sr1.checkpoint.retention import Keep  # noqa: E402
from megatron_sr1.checkpoint.saving import save_checkpoint  # noqa: E402
from megatron_sr1.checkpoint.tensors import Trained  # noqa: E402
from megatron_sr1.config.loading import load_config  # noqa: E402
from megatron_sr1.data.packing import pack_samples  # noqa: E402
from megatron_sr1.data.processor import Processor  # noqa: E402
from megatron_sr1.model.hf_config import read_hf_config  # noqa: E402
from megatron_sr1.model.qwen25_vl import build_model  # noqa: E402
from megatron_sr1.model.row_split import sequence_multiple  # noqa: E402
from megatron_sr1.records import TrainSample  # noqa: E402
from megatron_sr1.runtime.device import select_device, start_distributed  # noqa: E402
from megatron_sr1.runtime.groups import destroy_groups, make_groups  # noqa: E402
from megatron_sr1.runtime.rng import seed_everything  # noqa: E402
from megatron_sr1.trainer.actor import make_actor  # noqa: E402
from megatron_sr1.trainer.step import update  # noqa: E402


def start(layout, source):
    """Configuration and groups of a layout; the groups of the one before go."""
    tensor, pipeline, letters = re.fullmatch(r"(\d)x(\d)([csivupb]*)", layout).groups()
    config = load_config(
        None,
        [
            f"model.path={source}",
            f"model.dtype={'bfloat16' if 'b' in letters else 'float32'}",
            f"parallel.tensor={tensor}",
            f"parallel.pipeline={pipeline}",
            f"parallel.context={1 + ('c' in letters)}",
            f"parallel.sequence={'s' in letters}".lower(),
            f"parallel.vision={'images' if 'i' in letters else 'tensor'}",
            f"parallel.virtual={1 + ('v' in letters)}",
            f"parallel.stage_layers={[1, 3] if 'u' in letters else []}",
            f"parallel.distributed_optimizer={'p' not in letters}".lower(),
            "optimizer.learning_rate=1e-3",
            "optimizer.schedule=linear",
            "optimizer.warmup_steps=3",
        ],
    )

    destroy_groups()
    groups = make_groups(config.parallel, select_device("cpu"))
    seed_everything(1, groups)
    return config, groups


def load(config, groups):
    source = resolve_model(config.model.path)
    hf_config = read_hf_config(source.hf_files)
    with cpu.megatron_mode():
        chunks = build_model(hf_config, groups, config.model, config.parallel)
    load_model(chunks, source, hf_config, groups)
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
                save_checkpoint(to, 0, model, {}, source_directory=found.hf_files)


def resave(out, *plans):
    roundtrip(out, *plans, resave=True)


def make_samples(processor):
    """Six random sequences, every other one with an image; and the images' pixels."""
    rng = np.random.default_rng(3)
    samples, vision = [], []
    for index in range(6):
        grids, tokens = (), rng.integers(10, 300, size=12 + index).tolist()
        vision.append(None)
        if index % 2:
            image = Image.fromarray(rng.integers(0, 255, (56, 84, 3), dtype=np.uint8))
            grids, vision[-1] = (processor.grid(image),), processor.vision([image])
            tokens = [3, *([processor.image_pad_id] * 6), 4, *tokens]
        mask = np.arange(len(tokens)) >= len(tokens) - 8
        samples.append(TrainSample(index, len(grids), np.array(tokens), mask, grids))
    return samples, vision


def nll(logprobs, batch):
    return -(logprobs * batch.loss_mask).sum(), batch.loss_mask.sum(), {}


class Run:
    """A short training run under a layout."""

    def __init__(self, layout, source, processor):
        config, self.groups = start(layout, source)
        chunks, hf_config, found = load(config, self.groups)
        self.actor = make_actor(config, chunks, hf_config, found, self.groups, num_updates=6)
        samples, vision = make_samples(processor)
        multiple = sequence_multiple(self.groups.context.size)
        self.batches = pack_samples(
            samples[self.groups.data.rank :: self.groups.data.size],
            64,
            lambda index: vision[index],
            image_pad_id=processor.image_pad_id,
            merge_size=processor.merge_size,
            pad_multiple=self.groups.tensor.size * multiple,
            sequence_multiple=multiple,
        )

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
            save_checkpoint(
                out / saving,
                step,
                run.actor.trained,
                {"cursor": [2, 5]},
                Keep(1),
                source_directory=source,
            )
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
