"""Supervised runs that are saved under one layout and resumed under another, on each rank.

Usage: resumes.py OUT MODEL SHARDS PLAN ...
       A plan is a layout, `tp2`, whose run goes from start to end, or two, `tp2:pp2`: the second
       goes on from what the first had saved on its way, in this call or in one of another world
       before. `tp2a` trains adapters, `tp2d` with dropout. Writes OUT/PLAN/ and OUT/PLAN.json:
       {"lines": of metrics.jsonl, without times, "order": {step: indices, as the ranks read them},
       "files": digests of the last checkpoint}.
"""

import json
import shutil
import sys
from pathlib import Path

import torch.distributed as dist

from megatron_sr1.checkpoint.disk import read_manifest
from megatron_sr1.config.loading import load_config
from megatron_sr1.observability.metrics import read_lines
from megatron_sr1.runtime.device import select_device, start_distributed
from megatron_sr1.runtime.groups import gather_objects, make_groups
from megatron_sr1.runtime.rng import seed_everything
from megatron_sr1.stages import start
from megatron_sr1.trainer.samples import Samples
from megatron_sr1.trainer.sft import train_sft
from tests.layouts import destroy_groups

EXAMPLE = Path(__file__).resolve().parents[3] / "examples" / "digits_cpu.yaml"
NUM_STEPS, SAVED_STEP, PER_STEP = 4, 2, 7  # 7: two data-parallel ranks get 4 and 3
LEFT_OUT = ("time/", "memory/", "perf/", "stage")
LAYOUTS = {
    "dp1": [],
    "dp2": [],
    "tp2": ["parallel.tensor=2"],
    "pp2": ["parallel.pipeline=2"],
    "cp2": ["parallel.context=2"],
}
ADAPTERS = ["adapter.rank=4", "adapter.targets=['_proj$','qkv','mlp']", "adapter.dropout=0.1"]
LAYOUTS |= {f"{name}a": [*keys, *ADAPTERS[:2]] for name, keys in LAYOUTS.items()}
LAYOUTS |= {f"{name}d": [*LAYOUTS[name], *ADAPTERS] for name in ("dp2", "tp2")}


class Recording(Samples):
    """Notes what this rank learns from."""

    def pack(self, chosen, groups):
        """The batches, which hold each of the chosen samples once."""
        batches = super().pack(chosen, groups)
        places = [place for batch in batches for place in batch.sample_ids]
        assert sorted(places) == list(range(len(chosen))), places
        self.__dict__.setdefault("read", []).append([s.index for s in chosen])
        return batches


def goes_on_from(saved, output):
    """Leave in `output` what a run that was killed after `SAVED_STEP` had left."""
    name = f"step_{SAVED_STEP}"
    shutil.copytree(saved / "checkpoints" / name, output / "checkpoints" / name)
    (output / "checkpoints" / "latest").write_text(name + "\n")
    shutil.copyfile(saved / "metrics.jsonl", output / "metrics.jsonl")


def order_of(groups, read):
    """Step by step the indices that all data-parallel ranks together learned from, ascending."""
    told = gather_objects((groups.data.rank, read), groups.world)
    by_rank = dict(told)
    assert all(by_rank[rank] == read for rank, read in told), "ranks of one replica differ"
    ranks = range(groups.data.size)
    return {step: sorted(i for rank in ranks for i in by_rank[rank][step]) for step in read}


def run(out, model, shards, plan):
    from megatron.core import parallel_state

    *saved, layout = plan.split(":")
    output = out / plan
    if saved and dist.get_rank() == 0:
        goes_on_from(out / saved[0], output)
    dist.barrier()
    settings = [f"output={output}", f"model.path={model}", f"data.train={shards}", "stage=sft"]
    settings += [f"data.prompts_per_step={PER_STEP}", f"optimizer.num_steps={NUM_STEPS}"]
    settings += [
        f"checkpoint.every_steps={SAVED_STEP}",
        "checkpoint.keep_last=0",
        "evaluation.sets=",
    ]
    settings += ["data.pack_tokens=256"]  # several micro-batches
    config = load_config(EXAMPLE, [*settings, *LAYOUTS[layout]])
    if parallel_state.model_parallel_is_initialized():
        destroy_groups()
    groups = make_groups(config.parallel, select_device("cpu"))
    seed_everything(config.seed, groups)
    context, samples, actor, _ = start(config, groups)
    assert context.step == (SAVED_STEP if saved else 0)
    train_sft(context, actor, samples)
    context.close()
    first = 1 + (SAVED_STEP if saved else 0)
    order = order_of(groups, dict(enumerate(samples.read, first)))
    if dist.get_rank() == 0:
        lines = [
            {
                k: v
                for k, v in line.items()
                if not k.startswith(("time/", "memory/", "perf/", "stage"))
            }
            for line in read_lines(output / "metrics.jsonl")
        ]
        last = read_manifest(output / "checkpoints" / f"step_{NUM_STEPS}")
        files = {name: file.digest for name, file in last.items()}
        record = {"lines": lines, "order": order, "files": files}
        (out / f"{plan}.json").write_text(json.dumps(record))


def main():
    import megatron_sr1.stages as stages

    stages.Samples = Recording
    out, model, shards, *plans = sys.argv[1:]
    start_distributed(select_device("cpu"), 120)
    for plan in plans:
        run(Path(out), model, shards, plan)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
