"""Train, save and resume under settings of the optimizer's memory; write what came of it.

Usage: low_memory.py OUT MODEL_DIR PLAN...
A plan is a SETTING: three updates, saved to OUT/saved/SETTING, and two more; or FOLDER:SETTING:
two updates from what was saved in that folder. The numbers go to OUT/found.json under the plan's
name, weights and state to OUT/NAME.pt; the name of the second kind is FROM:SETTING.
A setting is WEIGHTS-STATE and letters: f float32 or b bfloat16 each, o offload, g gradients in
bfloat16; so b-b is bfloat16 weights with bfloat16 state, b-fo offloaded float32 state.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_sr1.checkpoint.loading import load_checkpoint
from megatron_sr1.checkpoint.saving import begin_save
from megatron_sr1.config.loading import load_config
from megatron_sr1.data.processor import Processor
from megatron_sr1.errors import CheckpointError
from megatron_sr1.runtime.device import select_device, start_distributed
from megatron_sr1.runtime.groups import make_groups
from megatron_sr1.runtime.rng import seed_everything
from megatron_sr1.trainer.actor import load_actor_model, make_actor
from megatron_sr1.trainer.step import update
from tests.distributed.ranks.checkpoints import make_batches, nll
from tests.layouts import destroy_groups

DTYPES = {"f": "float32", "b": "bfloat16"}


def configure(setting, model_dir):
    weights, _, rest = setting.partition("-")
    return load_config(
        None,
        [
            f"model.path={model_dir}",
            f"model.dtype={DTYPES[weights]}",
            f"optimizer.state={DTYPES[rest[0]]}",
            f"optimizer.gradients={'bfloat16' if 'g' in rest else 'float32'}",
            f"optimizer.offload={'o' in rest}".lower(),
            "optimizer.learning_rate=1e-3",
            "optimizer.weight_decay=0.1",
            "optimizer.clip_grad=0.5",
            "optimizer.beta2=0.95",
            "optimizer.schedule=linear",
            "optimizer.warmup_steps=2",
        ],
    )


class Run:
    """A short training run under a setting."""

    def __init__(self, setting, model_dir):

        destroy_groups()
        config = configure(setting, model_dir)
        self.groups = make_groups(config.parallel, select_device("cpu"))
        seed_everything(1, self.groups)
        loaded = load_actor_model(config, self.groups)
        self.actor = make_actor(config, *loaded, self.groups, num_updates=8)
        processor = Processor(model_dir, 784, 200704)
        # Each sequence by itself: the same products on one rank and on two.
        self.batches = make_batches(processor, self.groups, 1)

    @property
    def parts(self):
        return self.actor.wrapped, self.actor.optimizer, self.actor.scheduler, self.groups

    def updates(self, number):
        return [update(self.actor, self.batches, nll, 1.0) for _ in range(number)]

    def state(self):
        """What this rank's optimizer holds beyond the weights, of each of its shards."""
        (part,) = self.actor.optimizer.chained_optimizers
        inner = part.optimizer
        shards = [shard for group in inner.param_groups for shard in group["params"]]
        weights = {p.untyped_storage().data_ptr() for p in self.actor.chunks[0].parameters()}
        tensors = []
        for shard in shards:
            held = inner.state[shard]
            tensors += [held["exp_avg"], held["exp_avg_sq"], held.get("master_param", shard)]
        return [t.detach() for t in tensors if t.untyped_storage().data_ptr() not in weights]

    def found(self, path, updates):
        """Numbers of the updates; weights as they are exported, and state, go to a file."""
        parameters = list(self.actor.chunks[0].parameters())
        weights = {name: tensor.clone() for name, tensor in self.actor.weights()}
        state = self.state()
        parts = [None] * dist.get_world_size()
        dist.all_gather_object(parts, state)
        if dist.get_rank() == 0:
            torch.save({"weights": weights, "state": parts}, path)
        held = sum(t.numel() * t.element_size() for part in parts for t in part)
        return {
            "updates": updates,
            "state_bytes": held / sum(p.numel() for p in parameters),
            "gradients": sorted({str(p.main_grad.dtype) for p in parameters}),
            "live": sorted({str(p.dtype) for p in parameters}),
            "exported_are_live": torch.equal(in_order(parameters), in_order(weights.values())),
        }


def in_order(tensors):
    """All values of some tensors, sorted: the same under any names and fusing."""
    return torch.cat([tensor.detach().flatten() for tensor in tensors]).sort().values


def train(out, model_dir, setting):
    run = Run(setting, model_dir)
    first = run.updates(3)
    begin_save(out / "saved" / setting, 3, run.actor.trained, {}).finish()
    return run.found(out / f"{setting}.pt", first + run.updates(2))


def resume(out, model_dir, folder, setting):
    run = Run(setting, model_dir)
    try:
        load_checkpoint(folder, run.actor.trained)
    except CheckpointError as error:
        return {"refused": str(error)}
    return run.found(out / f"{folder.name}:{setting}.pt", run.updates(2))


def main():
    out, model_dir, *plans = sys.argv[1:]
    start_distributed(select_device("cpu"), 120)
    found = {}
    for plan in plans:
        folder, _, setting = plan.rpartition(":")
        if folder:
            name = f"{Path(folder).name}:{setting}"
            found[name] = resume(Path(out), model_dir, Path(folder), setting)
        else:
            found[setting] = train(Path(out), model_dir, setting)
    if dist.get_rank() == 0:
        (Path(out) / "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
