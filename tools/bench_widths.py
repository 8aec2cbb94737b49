"""Tokens per second of an update at the widths of Qwen2.5-VL-3B, here and in transformers' Trainer.

The model has 2 layers of text, 4 of vision, the published vocabulary and random weights, in float32
on a CPU; made here. The samples are 8 responses to one prompt with an image of 315 tokens, as GRPO
has them. Both sides imitate them: this trainer packs them into a row with one image, the Trainer
encodes the image of each sample. The sides take turns in rounds, each in a process of its own; its
first update is ignored. Counted are the samples' own tokens, optimizer included. The Trainer runs
in the environment of compare_trl.py, with micro-batches of two samples of the same length.

    python tools/bench_widths.py --result FILE
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from megatron_sr1.config.run import LaunchConfig
from megatron_sr1.gpu_checks.bench import (
    FIRST_TEXT_ID,
    LEARNING_RATE,
    PUBLISHED,
    TEXT_IDS,
    Bench,
    Sizes,
)
from megatron_sr1.launch.torchrun import rank_environment
from megatron_sr1.records import TrainSample
from tools.compare_sft import trainer_steps
from tools.compare_trl import ROOT, report, trl_python

SIZES = replace(
    PUBLISHED,
    text={**PUBLISHED.text, "num_hidden_layers": 2},
    vision={**PUBLISHED.vision, "depth": 4, "fullatt_block_indexes": [3]},
    grid=(30, 42),
    prompt_tokens=64,
    response_tokens=64,
)
NUM_SAMPLES, PER_MICRO_BATCH = 8, 2
SIDES = ("ours", "trainer")


class Widths(Bench):
    """A bench of these sizes, whose samples are responses to one prompt."""

    @property
    def sizes(self) -> Sizes:
        """Return the sizes, on any device."""
        return SIZES

    def responses(self) -> list[TrainSample]:
        """Return samples of one prompt, with responses of one length."""
        (first,), rng, found = self.samples(1), np.random.default_rng(1), []
        for _ in range(NUM_SAMPLES):
            ids = rng.integers(FIRST_TEXT_ID, TEXT_IDS, len(first.token_ids))
            found.append(replace(first, token_ids=np.where(first.loss_mask, ids, first.token_ids)))
        return found


def run_ours(bench: Widths, num_steps: int) -> list[float]:
    """Return the seconds of updates of this trainer."""
    from megatron_sr1.trainer.sft import token_loss
    from megatron_sr1.trainer.step import update

    actor = bench.actor(bench.config("model.dtype=float32"))
    rows, seconds = bench.rows(bench.responses()), []
    for _ in range(num_steps):
        started = time.perf_counter()
        update(actor, rows, token_loss, 1.0)
        seconds.append(time.perf_counter() - started)
    return seconds


def run_trainer(bench: Widths, num_steps: int) -> list[float]:
    """Return the seconds of updates of transformers' Trainer."""
    import torch

    from megatron_sr1.runtime.cpu import patch_torchvision

    patch_torchvision()

    def collate(samples: list[TrainSample]) -> dict[str, torch.Tensor]:
        ids = torch.from_numpy(np.stack([sample.token_ids for sample in samples]))
        learnt = torch.from_numpy(np.stack([sample.loss_mask for sample in samples]))
        images = [bench.vision(sample.index) for sample in samples]
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "labels": torch.where(learnt, ids, -100),
            "mm_token_type_ids": (ids == bench.hf_config.image_token_id).int(),
            "pixel_values": torch.cat([image.pixel_values for image in images]),
            "image_grid_thw": torch.cat([image.image_grid_thw for image in images]),
        }

    return trainer_steps(
        str(bench.model_dir),
        num_steps,
        collate,
        bench.responses() * num_steps,
        output_dir=str(bench.directory / "trainer"),
        per_device_train_batch_size=PER_MICRO_BATCH,
        gradient_accumulation_steps=NUM_SAMPLES // PER_MICRO_BATCH,
        learning_rate=LEARNING_RATE,
    )


def start_side(side: str, directory: Path, threads: int, num_steps: int) -> float:
    """Run a side in a process of its own; return the seconds of its fastest counted update."""
    result = directory / "seconds.json"
    python = trl_python() if side == "trainer" else sys.executable
    command = [python, __file__, "--side", side, str(directory), "--steps", str(num_steps)]
    launch = LaunchConfig(device="cpu", threads=threads)
    environment = {**os.environ, **rank_environment(launch, 1), "PYTHONPATH": str(ROOT)}
    command += ["--result", str(result)]
    subprocess.run(command, check=True, cwd=directory, env=environment, stdout=sys.stderr)
    return min(json.loads(result.read_text())[1:])


def main() -> None:
    """Let the sides take turns; print tokens per second and their ratio as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--threads", type=int, default=2, help="threads of each side")
    add("--steps", type=int, default=2, help="updates per side and round; the first is ignored")
    add("--rounds", type=int, default=2)
    add("--result", type=Path, help="also write the JSON to this file")
    add("--side", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        side, directory = arguments.side
        run = {"ours": run_ours, "trainer": run_trainer}[side]
        seconds = run(Widths("cpu", Path(directory)), arguments.steps)
        arguments.result.write_text(json.dumps(seconds))
        return
    rates: dict[str, list[float]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as temporary:
        bench = Widths("cpu", Path(temporary))
        num_tokens = sum(len(sample.token_ids) for sample in bench.responses())
        for _ in range(arguments.rounds):
            for side in SIDES:
                seconds = start_side(side, bench.directory, arguments.threads, arguments.steps)
                rates[side].append(num_tokens / seconds)
    ratios = [ours / theirs for ours, theirs in zip(*rates.values(), strict=True)]
    found = {"tokens_per_second": rates, "ratio_by_round": ratios}
    report({**found, "tokens": num_tokens, "ratio": statistics.median(ratios)}, arguments.result)


if __name__ == "__main__":
    main()
