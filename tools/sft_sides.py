"""The sides of compare_sft.py, each in a process of its own: SIDE JOB.json STEPS.json."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from megatron_sr1.config.run import Config
    from megatron_sr1.runtime.groups import Groups
    from megatron_sr1.trainer.samples import Samples

SIDES = ("packed", "padded", "trainer")
LEARNING_RATE = 1e-3


@dataclass(frozen=True)
class Job:
    """What all sides do alike.

    Attributes:
        model: Hugging Face directory.
        data: shards of conversations, as many as the steps take.
        output: run folder, replaced.
        pack_tokens: budget of a packed micro-batch, tokens.
        samples_per_step: conversations an update.
        num_steps: updates.
        num_threads: of the one process.
        padded_samples: conversations of a padded micro-batch.
    """

    model: str
    data: str
    output: str
    pack_tokens: int
    samples_per_step: int
    num_steps: int
    num_threads: int
    padded_samples: int = 1


def config_of(job: Job) -> Config:
    """The configuration of this trainer, whose samples and pixels all sides take."""
    from megatron_sr1.config.loading import load_config

    settings = {
        "stage": "sft",
        "model.path": job.model,
        "model.dtype": "float32",
        "data.train": job.data,
        "output": job.output,
        "data.pack_tokens": job.pack_tokens,
        "data.prompts_per_step": job.samples_per_step,
        "data.max_prompt_tokens": job.pack_tokens,
        "data.min_pixels": 784,
        "data.max_pixels": 200704,
        "optimizer.num_steps": job.num_steps,
        "optimizer.learning_rate": LEARNING_RATE,
        "checkpoint.every_steps": 0,
        "launch.device": "cpu",
        "launch.threads": job.num_threads,
    }
    return load_config(None, [f"{key}={value}" for key, value in settings.items()])


def run_ours(job: Job, *, pad: bool) -> list[tuple[int, float]]:
    """This trainer, with its packed micro-batches or padded ones: tokens and seconds of steps."""
    from megatron_sr1 import stages
    from megatron_sr1.data.packing import pack_samples
    from megatron_sr1.observability.metrics import read_lines
    from megatron_sr1.records import PackedBatch, TrainSample
    from megatron_sr1.runtime.device import stop_distributed
    from megatron_sr1.trainer.sft import train_sft

    config = config_of(job)
    groups, tokens = stages.start_ranks(config), []
    context, samples, actor, _ = stages.start(config, groups)
    pack_own, processor = samples.pack, samples.processor

    def pack(chosen: Sequence[TrainSample], groups: Groups) -> list[PackedBatch]:
        tokens.append(sum(len(sample.token_ids) for sample in chosen))
        if not pad:
            return pack_own(chosen, groups)
        batches = []
        for at in range(0, len(chosen), job.padded_samples):
            part = chosen[at : at + job.padded_samples]
            longest = max(len(sample.token_ids) for sample in part)
            batches += pack_samples(
                part,
                longest * len(part),
                samples.vision,
                image_pad_id=processor.image_pad_id,
                merge_size=processor.merge_size,
                pad_multiple=longest,
                sequence_multiple=longest,
            )
        return batches

    samples.pack = pack  # type: ignore[method-assign]
    train_sft(context, actor, samples)
    context.close()
    stop_distributed()
    lines = read_lines(Path(job.output) / "metrics.jsonl")
    return list(zip(tokens, (line["time/step_seconds"] for line in lines), strict=True))


def collate(samples: Samples, rows: Sequence[int]) -> dict[str, torch.Tensor]:
    """A padded micro-batch as transformers takes it."""
    import torch

    chosen, pad = [samples.conversation(index) for index in rows], samples.processor.image_pad_id
    shape = len(chosen), max(len(sample.token_ids) for sample in chosen)
    ids = torch.full(shape, samples.processor.end_token_ids[0])
    labels, mask = torch.full(shape, -100), torch.zeros(shape, dtype=torch.int64)
    for row, sample in enumerate(chosen):
        count = len(sample.token_ids)
        ids[row, :count] = torch.from_numpy(sample.token_ids)
        mask[row, :count] = 1
        targets = torch.from_numpy(sample.loss_mask)
        labels[row, :count] = torch.where(targets, ids[row, :count], -100)
    batch = {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": labels,
        "mm_token_type_ids": (ids == pad).int(),
    }
    images = [v for v in map(samples.vision, rows) if v is not None]
    samples.forget()
    if images:
        batch["pixel_values"] = torch.cat([v.pixel_values for v in images])
        batch["image_grid_thw"] = torch.cat([v.image_grid_thw for v in images])
    return batch


def run_trainer(job: Job) -> list[tuple[int, float]]:
    """The Trainer of transformers, with samples and pixels from this project's processor."""
    import torch

    torch.set_num_threads(job.num_threads)
    from megatron_sr1.trainer.samples import Samples, make_processor

    config = config_of(job)
    processor = make_processor(config)
    from transformers import (
        Qwen2_5_VLForConditionalGeneration,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    samples = Samples(config, job.data, processor)
    tokens: list[int] = []
    ends = [0.0]

    def counted(rows: list[int]) -> dict[str, torch.Tensor]:
        batch = collate(samples, rows)
        tokens.append(int(batch["attention_mask"].sum()))
        return batch

    class Clock(TrainerCallback):
        """When training began, and each step ended; ours are counted from end to end too."""

        def on_train_begin(self, *_: object, **__: object) -> None:
            ends[0] = time.perf_counter()

        def on_step_end(self, *_: object, **__: object) -> None:
            ends.append(time.perf_counter())

    per_step = job.samples_per_step // job.padded_samples
    trainer: Any = Trainer(
        model=Qwen2_5_VLForConditionalGeneration.from_pretrained(job.model, dtype=torch.float32),
        args=TrainingArguments(
            output_dir=job.output,
            per_device_train_batch_size=job.padded_samples,
            gradient_accumulation_steps=per_step,
            max_steps=job.num_steps,
            learning_rate=LEARNING_RATE,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
        ),
        train_dataset=list(range(len(samples))),
        data_collator=counted,
        callbacks=[Clock()],
    )
    trainer.train()
    steps = [sum(tokens[at : at + per_step]) for at in range(0, len(tokens), per_step)]
    return [(n, end - start) for n, (start, end) in zip(steps, pairwise(ends), strict=False)]


def main(side: str, asked: str, told: str) -> None:
    """Run one side; the folder of the run is made anew."""
    job = Job(**json.loads(Path(asked).read_text()))
    shutil.rmtree(job.output, ignore_errors=True)
    steps = run_trainer(job) if side == "trainer" else run_ours(job, pad=side == "padded")
    assert len(steps) == job.num_steps, (len(steps), job.num_steps)
    Path(told).write_text(json.dumps(steps))


if __name__ == "__main__":
    main(*sys.argv[1:])
