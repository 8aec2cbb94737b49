"""The sides of compare_sft.py, each in a process of its own: SIDE JOB.json STEPS.json."""

from __future__ import annotations

import json
import math
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
        pad_for: micro-batches of padded conversations fit the budget if all are this long: the
            "longest" of the data or the "mean".
        samples_per_step: conversations an update.
        num_steps: updates.
        num_threads: of the one process.
    """

    model: str
    data: str
    output: str
    pack_tokens: int
    pad_for: str
    samples_per_step: int
    num_steps: int
    num_threads: int


def run_ours(job: Job, *, pad: bool) -> list[tuple[int, float]]:
    """This trainer, with its packed micro-batches or padded ones: tokens and seconds of steps."""
    from megatron_sr1.config_file import load_config
    from megatron_sr1.data.packing import pack_samples
    from megatron_sr1.observability.metrics import read_lines
    from megatron_sr1.records import PackedBatch, TrainSample
    from megatron_sr1.runtime.device import stop_distributed
    from megatron_sr1.trainer import run, setup
    from megatron_sr1.trainer.sft import train_sft

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
    config = load_config(None, [f"{key}={value}" for key, value in settings.items()])
    _, groups = setup.start_ranks(config)
    context, samples, actor, _ = run.start(config, groups, job.num_steps)
    pack_own, tokens, size = context.pack, [], padded_size(job, samples)

    def pack(chosen: Sequence[TrainSample], samples: Samples) -> list[PackedBatch]:
        lengths = [len(sample.token_ids) for sample in chosen]
        tokens.append(sum(lengths))
        if not pad:
            return pack_own(chosen, samples)
        batches = []
        for at in range(0, len(chosen), size):
            longest = max(lengths[at : at + size])
            batches += pack_samples(
                chosen[at : at + size],
                longest * size,
                samples.vision,
                image_pad_id=context.processor.image_pad_id,
                merge_size=context.processor.merge_size,
                pad_multiple=longest,
                sequence_multiple=longest,
            )
        return batches

    context.pack = pack  # type: ignore[method-assign]
    train_sft(context, actor, samples)
    context.close()
    stop_distributed()
    lines = read_lines(Path(job.output) / "metrics.jsonl")
    return list(zip(tokens, (line["time/step_seconds"] for line in lines), strict=True))


def padded_size(job: Job, samples: Samples) -> int:
    """Conversations of a padded micro-batch: as many as the budget holds, a power of two."""
    lengths = [len(samples.conversation(index).token_ids) for index in range(len(samples))]
    samples.forget()
    length = max(lengths) if job.pad_for == "longest" else sum(lengths) / len(lengths)
    return 2 ** int(math.log2(job.pack_tokens / length))


def run_trainer(job: Job) -> list[tuple[int, float]]:
    """The Trainer of transformers, with samples and pixels from this project's processor."""
    import torch

    torch.set_num_threads(job.num_threads)
    from megatron_sr1.data.processor import Processor
    from megatron_sr1.records import TrainSample
    from megatron_sr1.trainer.samples import Samples

    processor = Processor(job.model, 784, 200704)
    from transformers import (
        Qwen2_5_VLForConditionalGeneration,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    samples = Samples(
        job.data,
        processor,
        recipe="vision_sr1",
        style="brief",
        pass2_order="description_first",
        max_prompt_tokens=job.pack_tokens,
    )
    size = padded_size(job, samples)
    tokens: list[int] = []
    seconds: list[float] = []

    def collate(rows: list[int]) -> dict[str, torch.Tensor]:
        chosen: list[TrainSample] = [samples.conversation(index) for index in rows]
        longest = max(len(sample.token_ids) for sample in chosen)
        ids = torch.full((len(chosen), longest), processor.end_token_ids[0])
        labels = torch.full((len(chosen), longest), -100)
        mask = torch.zeros((len(chosen), longest), dtype=torch.int64)
        for row, sample in enumerate(chosen):
            count = len(sample.token_ids)
            ids[row, :count] = torch.from_numpy(sample.token_ids)
            mask[row, :count] = 1
            targets = torch.from_numpy(sample.loss_mask)
            labels[row, :count] = torch.where(targets, ids[row, :count], -100)
        tokens.append(int(mask.sum()))
        images = [v for v in map(samples.vision, rows) if v is not None]
        samples.forget()
        batch = {
            "input_ids": ids,
            "attention_mask": mask,
            "labels": labels,
            "mm_token_type_ids": (ids == processor.image_pad_id).int(),
        }
        if images:
            batch["pixel_values"] = torch.cat([v.pixel_values for v in images])
            batch["image_grid_thw"] = torch.cat([v.image_grid_thw for v in images])
        return batch

    class Clock(TrainerCallback):
        """Seconds from the end of one step to that of the next, as ours are counted."""

        def on_train_begin(self, *_: object, **__: object) -> None:
            self.last = time.perf_counter()

        def on_step_end(self, *_: object, **__: object) -> None:
            now = time.perf_counter()
            seconds.append(now - self.last)
            self.last = now

    batches_per_step = job.samples_per_step // size
    trainer: Any = Trainer(
        model=Qwen2_5_VLForConditionalGeneration.from_pretrained(job.model, dtype=torch.float32),
        args=TrainingArguments(
            output_dir=job.output,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=batches_per_step,
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
        data_collator=collate,
        callbacks=[Clock()],
    )
    trainer.train()
    steps = [tokens[at : at + batches_per_step] for at in range(0, len(tokens), batches_per_step)]
    return [(sum(step), time) for step, time in zip(steps, seconds, strict=False)]


def main(side: str, asked: str, told: str) -> None:
    """Run one side; the folder of the run is made anew."""
    job = Job(**json.loads(Path(asked).read_text()))
    shutil.rmtree(job.output, ignore_errors=True)
    steps = run_trainer(job) if side == "trainer" else run_ours(job, pad=side == "padded")
    assert len(steps) == job.num_steps, (len(steps), job.num_steps)
    Path(told).write_text(json.dumps(steps))


if __name__ == "__main__":
    main(*sys.argv[1:])
