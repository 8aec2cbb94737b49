"""Many layouts and settings under one start of ranks: bytes planned against bytes allocated.

Usage: planned_memory.py MODELS OUT CASE…
MODELS holds directories with a config.json. A case is MODEL:LAYOUT:SETTING, the layout a short form
of `layout_settings`, the setting a key of SETTINGS; after another colon come more keys of
`parallel`. Every rank builds the real model, wraps it as a run does, makes one update over rows of
text and images, and counts. OUT gets one line a rank and case.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import FileSystemReader, TensorStorageMetadata

from megatron_sr1.checkpoint.mapping import is_tower_frozen
from megatron_sr1.checkpoint.tensors import Trained, save_tensors
from megatron_sr1.config.loading import load_config
from megatron_sr1.model.hf_config import check_layout, read_hf_config
from megatron_sr1.model.qwen25_vl import build_model
from megatron_sr1.planning.activations import Activations
from megatron_sr1.planning.adapters import DTYPE_BYTES, planned_adapters
from megatron_sr1.planning.layout import configured, in_flight
from megatron_sr1.planning.memory import checkpoint_bytes, static_memory
from megatron_sr1.records import PackedBatch
from megatron_sr1.runtime.device import select_device, start_distributed
from megatron_sr1.runtime.groups import make_groups, on_writer
from megatron_sr1.trainer.actor import add_adapters, make_actor
from megatron_sr1.trainer.step import update
from tests.layouts import destroy_groups, layout_settings
from tests.planned_models import SavedBytes, make_row

TOKENS, GRIDS = 256, [(20, 12)] * 4  # as many images as four ranks share out evenly
BFLOAT16 = ["model.dtype=bfloat16"]
SETTINGS = {
    "float32": ["model.dtype=float32"],
    "float32-whole": ["model.dtype=float32", "parallel.distributed_optimizer=false"],
    "bfloat16": BFLOAT16,
    "bfloat16-whole": [*BFLOAT16, "parallel.distributed_optimizer=false"],
    "offload": [*BFLOAT16, "optimizer.offload=true"],
    "low": [*BFLOAT16, "optimizer.state=bfloat16", "optimizer.beta2=0.95"],
    "lowest": [
        *BFLOAT16,
        "optimizer.state=bfloat16",
        "optimizer.gradients=bfloat16",
        "optimizer.offload=true",
        "optimizer.beta2=0.95",
    ],
    "frozen": [*BFLOAT16, "model.freeze=['^visual[.]']"],
    "adapters": [*BFLOAT16, "adapter.rank=6"],
    "adapters-model": [*BFLOAT16, "adapter.rank=6", "adapter.dtype=model"],
    "adapters-low": [
        *BFLOAT16,
        "adapter.rank=6",
        "adapter.dtype=model",
        "optimizer.state=bfloat16",
        "optimizer.gradients=bfloat16",
        "optimizer.beta2=0.95",
    ],
    "adapters-tower": [
        "model.dtype=float32",
        "adapter.rank=6",
        "adapter.targets=['^visual[.]','q_proj','down_proj']",
        "optimizer.offload=true",
    ],
}


def held_bytes(tensors, without=()):
    """Of different tensors; scalars are step counters in host memory."""
    known = {t.untyped_storage().data_ptr() for t in without}
    found = {
        (t.untyped_storage().data_ptr(), t.storage_offset()): t.numel() * t.element_size()
        for t in tensors
        if t.dim() and t.untyped_storage().data_ptr() not in known
    }
    return sum(found.values())


def storage_bytes(tensors):
    """Of the memory behind tensors, padding included."""
    storages = [t.untyped_storage() for t in tensors]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def make_batch(hf_config):
    """A row of text and images."""
    row = make_row(hf_config, [TOKENS], GRIDS)
    return PackedBatch((0,), loss_mask=torch.ones(1, TOKENS), **row)


def loss(logprobs, batch):
    total, num_tokens = -logprobs.sum(), batch.loss_mask.sum().int()
    return total, num_tokens, {"loss": (total.detach(), num_tokens)}


def measure(config, hf_config, groups, folder):
    """What the real classes hold after one update, and what autograd kept at most during it."""
    parallel = config.parallel
    chunks = build_model(hf_config, groups, config.model, parallel)
    weights = [parameter for chunk in chunks for parameter in chunk.parameters()]
    with torch.no_grad():
        for parameter in weights:
            parameter.fill_(0.01)
    add_adapters(config, chunks, hf_config, groups)
    weights = [parameter for chunk in chunks for parameter in chunk.parameters()]
    actor = make_actor(config, chunks, hf_config, None, groups, num_updates=2)
    rows = [make_batch(hf_config)] * (parallel.virtual + 1) * parallel.pipeline
    with SavedBytes(weights) as saved:
        update(actor, rows, loss, 1.0)
    assert not saved.now
    state = []
    for part in actor.optimizer.chained_optimizers:
        inner = part.optimizer
        shards = [p for group in inner.param_groups for p in group["params"]]
        state += shards + [t for p in shards for t in inner.state[p].values()]
    state = [t for t in state if isinstance(t, torch.Tensor)]
    return {
        "weights": storage_bytes(weights),
        "gradients": storage_bytes(b.grad_data for w in actor.wrapped for b in w.buffers),
        "optimizer": held_bytes(state, without=weights),
    } | saved_bytes(config, actor, groups, folder), saved.most


def saved_bytes(config, actor, groups, folder):
    """Of a checkpoint's tensors, read from its own list of them; with adapters alone."""
    if not config.adapter.rank:
        return {}
    on_writer(groups, folder.mkdir)
    save_tensors(folder, Trained(actor.wrapped, actor.optimizer, None, groups), False).finish()
    found = FileSystemReader(folder).read_metadata().state_dict_metadata.values()
    tensors = [each for each in found if isinstance(each, TensorStorageMetadata)]
    return {"saved": sum(t.size.numel() * t.properties.dtype.itemsize for t in tensors)}


def plan_activations(config, hf_config, layout, pipeline_rank):
    """Of the same rows."""
    adapters = planned_adapters(hf_config, config.adapter, config.model.dtype)
    e = DTYPE_BYTES[config.model.dtype]
    held = Activations(hf_config, layout, e, fused_mlp=False, adapters=adapters)
    tokens, patches = TOKENS / layout.context, sum(h * w for h, w in GRIDS) / layout.images
    layers, stages = layout.layers(hf_config.text.num_layers), layout.stages(pipeline_rank)
    layer = tokens * held.text_layer("none") + held.text_matrices("none")
    kept = [layer * len(layers[stage]) for stage in stages]
    has_tower = not is_tower_frozen(hf_config, config.model.freeze)
    if pipeline_rank == 0 and (adapters.is_in_tower if adapters else has_tower):
        kept[0] += patches * held.vision("none")
    if pipeline_rank == layout.pipeline - 1:
        kept[-1] += tokens * held.text_ends()
    numbers = in_flight(layout, pipeline_rank, kept)
    return sum(n * size for n, size in zip(numbers, kept, strict=True))


def main():
    models, out, *cases = sys.argv[1:]
    device = select_device("cpu")
    start_distributed(device)
    lines = []
    for case in cases:
        model, layout, setting, *more = case.split(":")
        path = Path(models) / model
        keys = [*layout_settings(layout), f"model.path={path}"]
        keys += [f"parallel.{key}" for key in " ".join(more).split()]
        config = load_config(None, [*keys, *SETTINGS[setting]])
        destroy_groups()
        groups = make_groups(config.parallel, device)
        hf_config = read_hf_config(path)
        layout = configured(config, dist.get_world_size())
        check_layout(hf_config, config.parallel)
        static = static_memory(
            config, hf_config, layout, groups.pipeline.rank, groups.data_context.rank
        )
        held, kept = measure(config, hf_config, groups, Path(f"{out}.{len(lines)}"))
        adapters = planned_adapters(hf_config, config.adapter, config.model.dtype)
        line = {
            "case": case,
            "planned": {
                "weights": static.weights,
                "gradients": static.gradients,
                "optimizer": static.optimizer + static.host,
                **({"saved": checkpoint_bytes(adapters, config.optimizer)} if adapters else {}),
            },
            "held": held,
            "planned_activations": plan_activations(
                config, hf_config, layout, groups.pipeline.rank
            ),
            "held_activations": kept,
        }
        lines.append(line)
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, lines)
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(gathered))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
