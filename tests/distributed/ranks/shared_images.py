"""Rows whose sequences share images, against the same rows with every image repeated.

Also twelve images of one colour each, in order and reversed: every rank has each image's features
at its place.

Run by test_shared_images.py as `shared_images.py CASES LAYOUT…`. What is expected comes from one
process with repeated images. Prints a line a failure and a count; exits non-zero on any failure.
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_sr1.checkpoint.hf import load_hf
from megatron_sr1.config.run import ModelConfig, ParallelConfig
from megatron_sr1.gpu_checks.numerics import published_gradients
from megatron_sr1.model.hf_config import read_hf_config
from megatron_sr1.model.qwen25_vl import build_model
from megatron_sr1.model.row_split import sequence_multiple
from megatron_sr1.model.vision import encode_by_turns
from megatron_sr1.records import VisionInputs
from megatron_sr1.runtime import cpu
from megatron_sr1.runtime.device import select_device, start_distributed
from megatron_sr1.runtime.groups import make_groups
from tests.distributed.ranks.model_layouts import (
    TOLERANCE,
    leave,
    parallel_of,
    run_schedule,
    samples_of,
)
from tests.layouts import destroy_groups
from tests.model_cases import make_row, worst_relative_gap

ORDER = (0, 1, 0, 0, 1)  # the samples of a row, as rollouts of two prompts


def make_rows(directory, groups, is_shared):
    """Rows of two samples each, time and again, and the patches of their distinct images."""
    multiple = sequence_multiple(groups.context.size)
    rows, num_patches = [], 0
    for first, *others in samples_of(directory):
        samples = [first, others[0] if others else first]
        row = make_row([samples[i] for i in ORDER], 2 * groups.tensor.size * multiple, multiple)
        once = make_row(samples).vision
        if once is not None:
            num_patches += len(once.pixel_values)
            counts = [0 if s.image_grid_thw is None else len(s.image_grid_thw) for s in samples]
            numbers = torch.arange(sum(counts)).split(counts)
            occurrences = torch.cat([numbers[i] for i in ORDER])
            if is_shared:
                row = replace(row, vision=replace(once, occurrences=occurrences))
        rows.append(row)
    return rows, num_patches


def encode_twelve(tower, groups, numbers):
    """Features of twelve images of one colour each and of three sizes, image by image."""
    vision = tower.vision
    side = 2 * vision.spatial_merge_size
    grids = torch.tensor([(1, side, side * (1 + number % 3)) for number in numbers])
    sizes = grids.prod(dim=-1).tolist()
    colours = [
        torch.full((size, vision.patch_dim), number / 12)
        for number, size in zip(numbers, sizes, strict=True)
    ]
    inputs = VisionInputs(torch.cat(colours), grids)
    with torch.no_grad(), cpu.megatron_mode():
        is_split = groups.images.size > 1
        features = encode_by_turns(tower, inputs, groups.images) if is_split else tower(inputs)
    return features.split([size // vision.spatial_merge_size**2 for size in sizes])


def measure(directory, groups, layout, is_shared):
    """Losses (None off the last stage), published gradients, patches encoded and distinct ones.

    Then the features of twelve images in order and reversed, None off the first stage.
    """
    hf_config = read_hf_config(directory)
    chunks = build_model(
        hf_config,
        groups,
        ModelConfig(dtype="float32", logprob_chunk_tokens=9),
        parallel_of(layout, hf_config.text.num_layers),
    )
    load_hf(chunks, directory, hf_config, groups)
    rows, num_patches = make_rows(directory, groups, is_shared)
    encoded = torch.zeros([])

    def count(layer, arguments):
        encoded.add_(len(arguments[0]))

    if chunks[0].vision_model is not None:
        chunks[0].vision_model.patch_embed.register_forward_pre_hook(count)
    with cpu.megatron_mode():
        losses = run_schedule(chunks, rows, groups, labels=True, forward_only=False)
    gradients = published_gradients(chunks, hf_config, groups)
    dist.all_reduce(encoded, group=groups.images.process_group)
    num_encoded = int(encoded)
    wanted = num_patches if groups.is_first_stage else 0
    twelve = None
    if chunks[0].vision_model is not None:
        twelve = [
            encode_twelve(chunks[0].vision_model, groups, numbers)
            for numbers in (range(12), range(11, -1, -1))
        ]
    return losses, gradients, num_encoded, wanted, twelve


def main():
    cases = sorted(Path(sys.argv[1]).iterdir())
    device = select_device("cpu")
    start_distributed(device)
    alone = make_groups(ParallelConfig(), device)
    expected = {case: measure(case, alone, "1x1x1", is_shared=False) for case in cases}
    problems, num_checked = [], 0
    for layout in sys.argv[2:]:
        destroy_groups()
        groups = make_groups(parallel_of(layout), device)
        for case in cases:
            found = measure(case, groups, layout, is_shared=True)
            losses, gradients, encoded, wanted, twelve = found
            gap, name = worst_relative_gap(gradients, expected[case][1])
            gaps = {f"gradient of {name}": gap, "patches": abs(encoded - wanted)}
            if groups.is_last_stage:
                got, want = torch.stack(losses), torch.stack(expected[case][0])
                gaps["loss"] = float(((got - want) / want).abs().max())
            if twelve is not None:
                in_order, backwards = twelve
                for what, images in (("order", in_order), ("reverse", backwards[::-1])):
                    pairs = zip(images, expected[case][4][0], strict=True)
                    gap = max(float((got - want).abs().max()) for got, want in pairs)
                    gaps[f"twelve images in {what}"] = gap
            problems += [
                f"{case.name} {layout}: {what} {gap}"
                for what, gap in gaps.items()
                if not gap < TOLERANCE
            ]
            num_checked += 1
    print("\n".join(problems) or f"SAME {num_checked} layouts of models", flush=True)
    leave(problems)


if __name__ == "__main__":
    main()
