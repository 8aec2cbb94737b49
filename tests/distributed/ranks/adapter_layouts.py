"""One start of ranks, models with adapters and layouts: logits, loss, gradients, exports.

Run by test_adapter_layouts.py as `adapter_layouts.py CASES SPEC LAYOUT…`, see model_layouts.py. The
test wrote PEFT's numbers, which are expected. After a layout's short form may come `-selective` or
`-full`, recomputation, or `-dropout`: then ranks with the same parameter must have the same
gradient. Prints a line a failure and a count.
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_sr1.checkpoint.adapters import (
    attach_adapters,
    export_adapters,
    load_adapter_tensors,
    local_adapters,
)
from megatron_sr1.checkpoint.hf import Gather, export_weights, load_hf
from megatron_sr1.config.run import ModelConfig
from megatron_sr1.model import layers
from megatron_sr1.model.hf_config import read_hf_config
from megatron_sr1.model.qwen25_vl import build_model
from megatron_sr1.model.row_split import sequence_multiple
from megatron_sr1.runtime import cpu
from megatron_sr1.runtime.device import select_device, start_distributed
from megatron_sr1.runtime.groups import gather_objects, make_groups
from tests.distributed.ranks.model_layouts import by_sample, leave, parallel_of, run_schedule
from tests.layouts import destroy_groups
from tests.model_cases import make_row, worst_relative_gap

TOLERANCE = 1e-5


def gradients(chunks, groups):
    """Whole gradients of A and B; that of a replicated one must be the same on all its ranks."""
    gather, found = Gather(chunks, groups), {}
    for entry, parameter in local_adapters(chunks):
        gather._mine[entry.name] = parameter.main_grad
    for pair in chunks[0].adapters.modules.values():
        for entry in pair:
            found |= dict(gather(entry))
    for entry, parameter in local_adapters(chunks):
        if entry.shard_dim is None:
            found[entry.hf_names[0]] = parameter.main_grad  # this rank's own
    return found


def measure(case, directory, groups, layout, spec):
    """The gaps from PEFT's numbers; None for a model with too few layers."""
    hf_config = read_hf_config(directory)
    parallel = parallel_of(layout.partition("-")[0], hf_config.text.num_layers)
    if parallel is None:
        return None
    option, settings = layout.partition("-")[2] or "none", case["settings"]
    recompute = "none" if option == "dropout" else option
    if option == "dropout":
        settings = replace(settings, dropout=0.5)
    model = ModelConfig(dtype="float32", spec=spec, logprob_chunk_tokens=9, recompute=recompute)
    chunks = build_model(hf_config, groups, model, parallel)
    load_hf(chunks, directory, hf_config, groups)
    attach_adapters(chunks, hf_config, groups, settings, seed=1)
    initial = {name: value.clone() for name, value in export_adapters(chunks, groups)}
    load_adapter_tensors(chunks, groups, case["tensors"])
    multiple = sequence_multiple(groups.context.size)
    pad = max(2, groups.tensor.size) * multiple
    rows = [make_row(samples, pad, multiple) for samples in case["rows"]]
    rows += rows[:1]  # the interleaved schedule takes an even number for two ranks
    with cpu.megatron_mode():
        with torch.no_grad():
            logits = run_schedule(chunks, rows, groups, labels=False, forward_only=True)
        losses = run_schedule(chunks, rows, groups, labels=True, forward_only=False)
    found = gradients(chunks, groups)
    gap, name = worst_relative_gap(found, case["gradients"])
    if option == "dropout":
        alike = {"gradients as without dropout": float(gap < 0.1)}
        return alike | {"ranks differ": spread(found, groups.tensor)}
    gaps = {f"gradient of {name}": gap}
    if groups.is_last_stage:
        total = torch.stack(losses).sum()
        gaps["loss"] = float(abs((total - case["loss"]) / case["loss"]))
        for row, wanted, found in zip(rows, case["logits"], logits, strict=False):
            pairs = zip(by_sample(found[0], row), wanted, strict=False)
            worst = max(float((part[: len(one)] - one).abs().max()) for part, one in pairs)
            gaps["logits"] = max(gaps.get("logits", 0.0), worst)
    exported = dict(export_weights(chunks, hf_config, groups))
    same = all(torch.equal(exported[name], value) for name, value in case["merged"].items())
    gaps["merged weights"] = float(not same)
    wanted = case["initial"]
    gaps["initial A and B"] = float(any(not torch.equal(initial[n], wanted[n]) for n in wanted))
    if any(parameter.requires_grad for parameter in bases(chunks)):
        gaps["a base weight is trained"] = 1.0
    return gaps


def spread(tensors, group):
    """The largest difference of this rank's tensors from those of another in the group."""
    values = torch.cat([tensor.flatten() for tensor in tensors.values()])
    others = [torch.empty_like(values) for _ in range(group.size)]
    dist.all_gather(others, values, group=group.process_group)
    return max(float((other - values).abs().max()) for other in others)


def bases(chunks):
    own = {id(parameter) for _, parameter in local_adapters(chunks)}
    return [p for chunk in chunks for p in chunk.parameters() if id(p) not in own]


def main():
    directory, spec, *layouts = sys.argv[1:]
    start_distributed(select_device("cpu"))
    layers.require_transformer_engine = lambda: None  # it asks for CUDA
    num_problems, num_checked = 0, 0
    for layout in layouts:
        groups = make_groups(parallel_of(layout.partition("-")[0]), select_device("cpu"))
        for path in sorted(Path(directory).iterdir()):
            case = torch.load(path / "case.pt", weights_only=False)
            gaps = measure(case, path, groups, layout, spec)
            if gaps is None:
                continue
            num_checked += 1
            for what, gap in gaps.items():
                if not gap < TOLERANCE:
                    num_problems += 1
                    print(f"GAP {path.name} {layout}: {what} {gap:.2e}", flush=True)
        destroy_groups()
    print(f"CHECKED {num_checked} layouts of models", flush=True)
    leave(sum(gather_objects(num_problems, groups_of_all())))


def groups_of_all():
    from megatron_sr1.runtime.groups import Group

    return Group.of(dist.group.WORLD)


if __name__ == "__main__":
    main()
