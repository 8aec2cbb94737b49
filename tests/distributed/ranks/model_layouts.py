"""One start of ranks, many models and layouts: logits, loss and gradients under each.

Run by test_model_layouts.py as `model_layouts.py CASES LAYOUT…`; a layout is a short form of
`layout_settings`. A model with too few layers for the stages is left out.
What one process computes comes from the same ranks: under tensor 1, pipeline 1, context 1 each
holds the whole model. Prints a line a failure and a count; exits non-zero on any failure.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_sr1.checkpoint.hf import load_hf
from megatron_sr1.config.loading import load_config
from megatron_sr1.config.run import ModelConfig, ParallelConfig
from megatron_sr1.gpu_checks.numerics import published_gradients
from megatron_sr1.model.hf_config import read_hf_config
from megatron_sr1.model.qwen25_vl import build_model
from megatron_sr1.model.row_split import sequence_multiple
from megatron_sr1.runtime import cpu
from megatron_sr1.runtime.device import select_device, start_distributed, stop_distributed
from megatron_sr1.runtime.groups import make_groups
from tests.layouts import destroy_groups, layout_settings
from tests.model_cases import make_row, worst_relative_gap

TOLERANCE = 1e-5
TEMPERATURE = 0.8


def run_schedule(chunks, rows, groups, labels, forward_only):
    """Each row's output on the last stage; gradients of the mean logprob over all targets."""
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.pipeline_parallel import get_forward_backward_func

    models, outputs, config = chunks, [], chunks[0].config
    if not forward_only:
        models = [
            DistributedDataParallel(config, DistributedDataParallelConfig(), c) for c in chunks
        ]
        no_sync = [model.no_sync for model in models]
        config.finalize_model_grads_func = finalize_model_grads
        config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
        for model in models:
            model.zero_grad_buffer()

    def forward(iterator, stage):
        row = next(iterator)
        output = stage(**row.inputs, temperature=TEMPERATURE, labels=row.labels if labels else None)

        def loss(output, non_loss_data=False):
            if forward_only:
                outputs.append(output)
                return output
            total = (output * row.loss_mask).sum()
            outputs.append(total.detach())
            num_tokens = row.loss_mask.sum().int()
            return total, num_tokens if groups.counts_tokens else 0 * num_tokens, {}

        return output, loss

    get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=[iter(rows) for _ in models],
        model=models,
        num_microbatches=len(rows),
        seq_length=rows[0].input_ids.shape[1],
        micro_batch_size=1,
        forward_only=forward_only,
        collect_non_loss_data=forward_only,
    )
    return outputs


def parallel_of(layout, num_layers=9):
    """The settings of a layout; None where the model has too few layers for its stages."""
    config = load_config(None, ["model.path=unused", *layout_settings(layout, num_layers)])
    parallel = config.parallel
    num_stages = parallel.pipeline * parallel.virtual
    return parallel if num_layers >= num_stages + bool(parallel.stage_layers) else None


def measure(directory, groups, layout="1x1x1", spec="local"):
    """Logits, losses (None off the last stage) and published gradients of a model."""
    hf_config = read_hf_config(directory)
    parallel = parallel_of(layout, hf_config.text.num_layers)
    if parallel is None:
        return None
    chunks = build_model(
        hf_config,
        groups,
        ModelConfig(dtype="float32", spec=spec, logprob_chunk_tokens=9),
        parallel,
    )
    load_hf(chunks, directory, hf_config, groups)
    multiple = sequence_multiple(groups.context.size)
    pad = max(2, groups.tensor.size) * multiple
    # One row more, as the interleaved schedule takes an even number for two ranks.
    rows = [make_row(s, pad, multiple) for s in samples_of(directory)]
    rows += rows[:1]
    encoded = torch.zeros([])

    def count(tower, arguments):
        encoded.add_(len(arguments[0].pixel_values))

    if chunks[0].vision_model is not None:
        chunks[0].vision_model.register_forward_pre_hook(count)
    with cpu.megatron_mode():
        with torch.no_grad():
            logits = run_schedule(chunks, rows, groups, labels=False, forward_only=True)
        losses = run_schedule(chunks, rows, groups, labels=True, forward_only=False)
    gradients = published_gradients(chunks, hf_config, groups)
    check_encoded(encoded, rows, groups)
    if not groups.is_last_stage:
        return None, None, gradients
    return [by_sample(x[0], r) for x, r in zip(logits, rows, strict=True)], losses, gradients


def check_encoded(encoded, rows, groups):
    """In two passes each patch was encoded once on all ranks together that share out images."""
    dist.all_reduce(encoded, group=groups.images.process_group)
    patches = sum(len(row.vision.pixel_values) for row in rows if row.vision is not None)
    assert encoded == (2 * patches if groups.is_first_stage else 0), (encoded, patches)


def by_sample(logits, row):
    """A row's logits [T, ids] cut at its borders."""
    return logits.split(row.cu_seqlens.diff().tolist())


def samples_of(directory):
    return torch.load(directory / "samples.pt", weights_only=False)


def compare(found, expected, directory):
    """What was compared and its gap."""
    logits, losses, gradients = found
    _, expected_losses, expected_gradients = expected
    gap, name = worst_relative_gap(gradients, expected_gradients)
    gaps = {f"gradient of {name}": gap}
    if logits is not None:
        found, wanted = torch.stack(losses), torch.stack(expected_losses)
        gaps["loss"] = float(((found - wanted) / wanted).abs().max())
        for i, (row, samples) in enumerate(zip(logits, samples_of(directory), strict=False)):
            pairs = zip(row, samples, strict=False)  # the last of a row may be padding
            gaps[f"logits of row {i}"] = max(
                float((part[: len(s.logits)] - s.logits).abs().max()) for part, s in pairs
            )
    return gaps


def leave(failed):
    """End all ranks together, with a status of 1 if this one failed."""
    dist.barrier()
    stop_distributed()
    sys.exit(bool(failed))


def main():
    cases = sorted(Path(sys.argv[1]).iterdir())
    device = select_device("cpu")
    start_distributed(device)
    alone = make_groups(ParallelConfig(), device)
    expected = {case: measure(case, alone) for case in cases}
    num_problems, num_checked = 0, 0
    for layout in sys.argv[2:]:
        destroy_groups()
        groups = make_groups(parallel_of(layout), device)
        for case in cases:
            found = measure(case, groups, layout)
            if found is None:
                continue
            gaps = compare(found, expected[case], case)
            num_checked += 1
            for what, gap in gaps.items():
                if not gap < TOLERANCE:
                    num_problems += 1
                    print(f"GAP {case.name} {layout}: {what} {gap:.2e}", flush=True)
    print(f"CHECKED {num_checked} layouts of models", flush=True)
    leave(num_problems)


if __name__ == "__main__":
    main()
