"""Many layouts and settings under one start of ranks: bytes planned against bytes allocated.

Usage: planned_memory.py MODELS OUT LAYOUT…
MODELS holds directories with a config.json; a layout is MODEL:TENSOR,PIPELINE,SEQUENCE:SETTING, a
setting as in SETTINGS. Every rank builds the real model, wraps it as a run does, makes one update
with gradients of zero, and counts. OUT gets one line a rank and layout.
"""

import json
import sys
from pathlib import Path

from megatron_sr1.runtime import cpu

cpu.install()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from megatron_sr1.config_file import load_config  # noqa: E402
from megatron_sr1.model.build import build_model  # noqa: E402
from megatron_sr1.model.hf_config import read_hf_config  # noqa: E402
from megatron_sr1.planning.activations import (  # noqa: E402
    Kernels,
    text_ends_bytes,
    text_layer_bytes,
    vision_bytes,
)
from megatron_sr1.planning.layout import configured  # noqa: E402
from megatron_sr1.planning.memory import (  # noqa: E402
    DTYPE_BYTES,
    is_tower_frozen,
    static_memory,
)
from megatron_sr1.runtime.device import select_device, start_distributed  # noqa: E402
from megatron_sr1.runtime.groups import destroy_groups, make_groups  # noqa: E402
from megatron_sr1.trainer.actor import make_actor  # noqa: E402
from megatron_sr1.trainer.optimizer import DTYPES  # noqa: E402
from tests.planned_models import make_row, saved_bytes  # noqa: E402

TOKENS, GRID = 256, (20, 24)
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


def measure(config, hf_config, groups):
    """What the real classes hold after one update, and what a forward pass then keeps."""
    chunks = build_model(
        hf_config,
        groups,
        dtype=DTYPES[config.model.dtype],
        sequence_parallel=config.parallel.sequence,
    )
    with torch.no_grad():
        for parameter in chunks[0].parameters():
            parameter.fill_(0.01)
    actor = make_actor(config, chunks, hf_config, None, groups, num_updates=2)
    with cpu.megatron_mode():
        assert actor.optimizer.step()[0]
    kept = None
    if groups.pipeline.size == 1:
        kept = saved_bytes(chunks[0], make_row(hf_config, [TOKENS], [GRID]))
    weights = list(chunks[0].parameters())
    state = []
    for part in actor.optimizer.chained_optimizers:
        inner = part.optimizer
        shards = [p for group in inner.param_groups for p in group["params"]]
        state += shards + [t for p in shards for t in inner.state[p].values()]
    state = [t for t in state if isinstance(t, torch.Tensor)]
    return {
        "weights": storage_bytes(weights),
        "gradients": storage_bytes(b.grad_data for b in actor.wrapped[0].buffers),
        "optimizer": held_bytes(state, without=weights),
    }, kept


def plan_activations(config, hf_config, layout):
    """Of the same row."""
    kernels = Kernels(DTYPE_BYTES[config.model.dtype], fused_mlp=False)
    per_token = text_layer_bytes(hf_config, layout, kernels, "none") * hf_config.text.num_layers
    kept = TOKENS * (per_token + text_ends_bytes(hf_config, layout, kernels))
    if is_tower_frozen(hf_config, config.model.freeze):
        return kept
    return kept + GRID[0] * GRID[1] * vision_bytes(hf_config, layout, kernels, "none")


def main():

    models, out, *cases = sys.argv[1:]
    device = select_device("cpu")
    start_distributed(device)
    lines = []
    for case in cases:
        model, layout, setting = case.split(":")
        tensor, pipeline, sequence = map(int, layout.split(","))
        path = Path(models) / model
        keys = [f"parallel.tensor={tensor}", f"parallel.pipeline={pipeline}"]
        keys += [f"parallel.sequence={bool(sequence)}".lower(), f"model.path={path}"]
        config = load_config(None, [*keys, *SETTINGS[setting]])
        destroy_groups()
        groups = make_groups(config.parallel, device)
        hf_config = read_hf_config(path)
        layout = configured(config, dist.get_world_size())
        static = static_memory(
            config, hf_config, layout, groups.pipeline.rank, groups.data_context.rank
        )
        held, kept = measure(config, hf_config, groups)
        line = {
            "case": case,
            "planned": {
                "weights": static.weights,
                "gradients": static.gradients,
                "optimizer": static.optimizer + static.host,
            },
            "held": held,
            "planned_activations": plan_activations(config, hf_config, layout),
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
