"""Random small Qwen2.5-VL models with samples and transformers' own numbers for them.

What the model's parity and distributed tests share. Every case has a sample with several images of
unequal sizes and one without any; windows are smaller than most images, so they really split.
"""

import random
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from megatron_sr1.gpu_checks.bench import randomise
from megatron_sr1.records import VisionInputs

NUM_SPECIAL = 4  # the last ids: vision start, vision end, image pad, video pad


@dataclass(frozen=True)
class Sample:
    """One sequence and transformers' numbers for it: positions [3, T], logits [T, ids]."""

    token_ids: torch.Tensor
    pixel_values: torch.Tensor | None
    image_grid_thw: torch.Tensor | None
    position_ids: torch.Tensor
    logits: torch.Tensor


@dataclass(frozen=True)
class Row:
    """What the model's forward takes for some samples in one row."""

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    vision: VisionInputs | None
    labels: torch.Tensor
    loss_mask: torch.Tensor

    @property
    def inputs(self):
        names = ("input_ids", "position_ids", "cu_seqlens", "vision")
        return {name: getattr(self, name) for name in names}


def random_config(seed):
    """A configuration that two tensor-parallel ranks and two stages divide."""
    from transformers import Qwen2_5_VLConfig

    rng = random.Random(seed)
    head_dim = rng.choice([12, 16, 32])
    kv_heads = rng.choice([2, 4])
    heads = kv_heads * rng.choice([1, 2, 3])
    first = rng.randint(1, head_dim // 4)
    second = rng.randint(1, head_dim // 2 - first - 1)
    merge = rng.choice([1, 2, 2, 3])
    patch = rng.choice([2, 4])
    vision_heads = rng.choice([2, 4])
    depth = rng.randint(2, 4)
    vocab_size = rng.choice([96, 131, 257])
    tied = seed % 2 == 0
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": vocab_size,
            "hidden_size": heads * head_dim,
            "intermediate_size": 2 * rng.randint(20, 60),
            "num_hidden_layers": rng.choice([2, 4]),
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "rms_norm_eps": rng.choice([1e-6, 1e-5]),
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": rng.choice([1e4, 1e6]),
                "mrope_section": [first, second, head_dim // 2 - first - second],
            },
            "tie_word_embeddings": tied,
        },
        vision_config={
            "depth": depth,
            "hidden_size": vision_heads * rng.choice([8, 12, 20]),
            "intermediate_size": 2 * rng.randint(20, 50),
            "num_heads": vision_heads,
            "patch_size": patch,
            "temporal_patch_size": rng.choice([1, 2]),
            "spatial_merge_size": merge,
            "window_size": patch * merge * rng.choice([1, 2, 3]),
            "out_hidden_size": heads * head_dim,
            "fullatt_block_indexes": sorted(rng.sample(range(depth), rng.randint(0, depth - 1))),
        },
        vision_start_token_id=vocab_size - 4,
        vision_end_token_id=vocab_size - 3,
        image_token_id=vocab_size - 2,
        video_token_id=vocab_size - 1,
        tie_word_embeddings=tied,
    )


def write_case(directory, seed, num_images=((3, 1), (0,), (1, 2, 0))):
    """Write a random model to a directory; returns its samples, some packed rows' worth.

    Args:
        directory: where the Hugging Face directory goes.
        seed: of everything.
        num_images: per row, the images of each of its samples.
    """
    from megatron_sr1.runtime.cpu import patch_torchvision

    patch_torchvision()
    from transformers import Qwen2_5_VLForConditionalGeneration

    config = random_config(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(config).eval()
        randomise(model)
        rng = random.Random(seed)
        rows = [[_sample(model, config, n, rng) for n in row] for row in num_images]
    model.save_pretrained(Path(directory))
    return model, rows


def make_row(samples, pad_multiple=1, sequence_multiple=1):
    """Samples one behind the other, each and then the row padded to a multiple."""
    counts = [len(s.token_ids) for s in samples]
    fills = [-n % sequence_multiple for n in counts]
    lengths = [n + fill for n, fill in zip(counts, fills, strict=True)]
    padding = -sum(lengths) % pad_multiple
    # A wrong padding token would show: it is one of the vocabulary's, at positions of its own.
    ids = [F.pad(s.token_ids, (0, n), value=1) for s, n in zip(samples, fills, strict=True)]
    positions = [
        F.pad(s.position_ids, (0, n), value=3) for s, n in zip(samples, fills, strict=True)
    ]
    labels = [F.pad(s.token_ids[1:], (0, n + 1)) for s, n in zip(samples, fills, strict=True)]
    # Targets are text: every second of them, so that some tokens have no gradient.
    masks = [
        torch.tensor([float(i % 2 == 0 and i < n - 1) for i in range(n + fill)])
        for n, fill in zip(counts, fills, strict=True)
    ]
    if padding:
        lengths.append(padding)
        ids.append(torch.zeros(padding, dtype=torch.int64))
        positions.append(torch.arange(padding).expand(3, -1))
        labels.append(ids[-1])
        masks.append(torch.zeros(padding))
    pixels = [s.pixel_values for s in samples if s.pixel_values is not None]
    grids = [s.image_grid_thw for s in samples if s.image_grid_thw is not None]
    return Row(
        input_ids=torch.cat(ids)[None],
        position_ids=torch.cat(positions, dim=-1)[:, None],
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).int(),
        vision=VisionInputs(torch.cat(pixels), torch.cat(grids)) if pixels else None,
        labels=torch.cat(labels)[None],
        loss_mask=torch.cat(masks)[None],
    )


@torch.no_grad()
def _sample(model, config, num_images, rng):
    vision = config.vision_config
    merge = vision.spatial_merge_size

    def text():
        highest = config.text_config.vocab_size - NUM_SPECIAL
        return torch.randint(0, highest, (rng.randint(2, 9),))

    ids, grids = [text()], []
    for _ in range(num_images):
        height, width = merge * rng.randint(1, 6), merge * rng.randint(1, 6)
        grids.append([1, height, width])
        pads = torch.full((height * width // merge**2,), config.image_token_id)
        marks = (
            torch.tensor([config.vision_start_token_id]),
            torch.tensor([config.vision_end_token_id]),
        )
        ids += [marks[0], pads, marks[1], text()]
    token_ids = torch.cat(ids)
    kind = (token_ids == config.image_token_id).int()[None]
    if not num_images:
        positions = torch.arange(len(token_ids)).expand(3, -1).contiguous()
        logits = model(input_ids=token_ids[None]).logits[0]
        return Sample(token_ids, None, None, positions, logits)
    grid = torch.tensor(grids)
    patch_dim = 3 * vision.temporal_patch_size * vision.patch_size**2
    pixels = torch.randn(int(grid.prod(dim=-1).sum()), patch_dim)
    positions, _ = model.model.get_rope_index(token_ids[None], kind, image_grid_thw=grid)
    logits = model(
        input_ids=token_ids[None],
        pixel_values=pixels,
        image_grid_thw=grid,
        mm_token_type_ids=kind,
    ).logits[0]
    return Sample(token_ids, pixels, grid, positions[:, 0], logits)


def worst_relative_gap(found, expected):
    """Largest |found - expected| over a tensor's largest |expected|, and the tensor's name."""
    assert found.keys() == expected.keys()
    gaps = {
        name: float((found[name] - want).abs().max() / want.abs().max().clamp(min=1e-6))
        for name, want in expected.items()
    }
    name = max(gaps, key=lambda n: gaps[n])
    return gaps[name], name
