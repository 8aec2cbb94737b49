"""Measure tokens per second of fine-tuning: packed, padded, and with transformers' Trainer.

All sides learn from the same conversations about digits, on the same model, from random weights,
with the same samples per update and as many threads, and take turns in rounds, each in a process of
its own. Lengths are mixed: a conversation joins one to `--turns` turns of the demo's cold start,
each with its image. Padded micro-batches, ours and the Trainer's, are filled up to their longest
conversation; they hold as many as the budget of the packed ones would, if all were as long as the
longest of the data (`--pad-for`). Counted are the conversations' own tokens, images expanded. The
first steps of a round are ignored. The Trainer runs in the environment of compare_trl.py.

    python tools/compare_sft.py
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_sr1.config.loading import load_config
from megatron_sr1.config.run import Config, LaunchConfig
from megatron_sr1.launch.torchrun import rank_environment
from megatron_sr1.runtime.groups import Groups
from megatron_sr1.trainer.samples import Samples, make_processor
from tools.compare_trl import ROOT, report, trl_python

if TYPE_CHECKING:
    import torch

SIDES = ("packed", "padded", "trainer")
WARM_UP_STEPS = 2


def run_ours(config: Config, padded_samples: int) -> list[tuple[int, float]]:
    """Run this trainer on packed micro-batches (0) or padded ones; return tokens and seconds."""
    from megatron_sr1 import stages
    from megatron_sr1.data.packing import pack_samples
    from megatron_sr1.observability.metrics import read_lines
    from megatron_sr1.records import PackedBatch, TrainSample
    from megatron_sr1.runtime.device import stop_distributed
    from megatron_sr1.trainer.sft import train_sft

    groups = stages.start_ranks(config)
    context, samples, actor, _ = stages.start(config, groups)
    pack_own, tokens = samples.pack, []

    def pack(chosen: Sequence[TrainSample], groups: Groups) -> Sequence[PackedBatch]:
        tokens.append(sum(len(sample.token_ids) for sample in chosen))
        if not padded_samples:
            return pack_own(chosen, groups)
        batches = []
        for at in range(0, len(chosen), padded_samples):
            part = chosen[at : at + padded_samples]
            longest = max(len(sample.token_ids) for sample in part)
            batches += pack_samples(
                part,
                longest * len(part),
                samples.vision,
                image_pad_id=samples.processor.image_pad_id,
                merge_size=samples.processor.merge_size,
                pad_multiple=longest,
                sequence_multiple=longest,
            )
        return batches

    samples.pack = pack  # type: ignore[method-assign]
    train_sft(context, actor, samples)
    context.close()
    stop_distributed()
    lines = read_lines(Path(config.output) / "metrics.jsonl")
    return list(zip(tokens, (line["time/step_seconds"] for line in lines), strict=True))


def collate(samples: Samples, rows: Sequence[int]) -> dict[str, torch.Tensor]:
    """Return a padded micro-batch as transformers takes it."""
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
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    batch["mm_token_type_ids"] = (ids == pad).int()
    images = [v for v in map(samples.vision, rows) if v is not None]
    samples.forget()
    if images:
        batch["pixel_values"] = torch.cat([v.pixel_values for v in images])
        batch["image_grid_thw"] = torch.cat([v.image_grid_thw for v in images])
    return batch


def trainer_steps(
    model_dir: str,
    num_steps: int,
    collate: Callable[[list[Any]], dict[str, torch.Tensor]],
    dataset: Sequence[Any],
    **settings: Any,
) -> list[float]:
    """Return the seconds of each step of transformers' Trainer in float32, from end to end."""
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration as HFModel
    from transformers import Trainer, TrainerCallback, TrainingArguments

    ends: list[float] = []

    class Clock(TrainerCallback):
        """Records when training begins and each step ends."""

        def on_train_begin(self, *_: object, **__: object) -> None:
            ends.append(time.perf_counter())

        on_step_end = on_train_begin

    trainer: Any = Trainer(
        model=HFModel.from_pretrained(model_dir, dtype=torch.float32),
        args=TrainingArguments(
            max_steps=num_steps,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            **settings,
        ),
        train_dataset=list(dataset),
        data_collator=collate,
        callbacks=[Clock()],
    )
    trainer.train()
    return [end - start for start, end in pairwise(ends)]


def run_trainer(config: Config, padded_samples: int) -> list[tuple[int, float]]:
    """Run transformers' Trainer on this project's samples; return what `run_ours` returns."""
    import torch

    torch.set_num_threads(config.launch.threads)
    samples = Samples(config, config.data.train, make_processor(config))
    tokens: list[int] = []

    def counted(rows: list[int]) -> dict[str, torch.Tensor]:
        batch = collate(samples, rows)
        tokens.append(int(batch["attention_mask"].sum()))
        return batch

    per_step = config.data.prompts_per_step // padded_samples
    seconds = trainer_steps(
        config.model.path,
        config.optimizer.num_steps,
        counted,
        range(len(samples)),
        output_dir=config.output,
        per_device_train_batch_size=padded_samples,
        gradient_accumulation_steps=per_step,
        learning_rate=config.optimizer.learning_rate,
    )
    steps = [sum(tokens[at : at + per_step]) for at in range(0, len(tokens), per_step)]
    return list(zip(steps, seconds, strict=False))


def run_side(side: str, padded: int, settings: list[str], result: Path) -> None:
    """Run one side in this process; write the tokens and seconds of each step."""
    config = load_config(None, settings)
    shutil.rmtree(config.output, ignore_errors=True)
    if side == "trainer":
        steps = run_trainer(config, padded)
    else:
        steps = run_ours(config, padded if side == "padded" else 0)
    assert len(steps) == config.optimizer.num_steps, len(steps)
    result.write_text(json.dumps(steps))


def write_conversations(directory: Path, work: Path, num_samples: int, max_turns: int) -> None:
    """Write shards of conversations of one to `max_turns` turns, equally many of each."""
    import numpy as np

    from megatron_sr1.data.examples import Record
    from megatron_sr1.data.shards import ShardReader, write_shards
    from megatron_sr1.demo.digits import make_digits

    rng = np.random.default_rng(0)
    num_turns = 1 + np.arange(num_samples) % max_turns
    rng.shuffle(num_turns)
    sets = make_digits(work, 0, num_train=1, num_eval=1, num_cold_start=int(num_turns.sum()))
    reader = ShardReader(sets["cold_start"])

    def records() -> Iterator[Record]:
        at = 0
        for count in num_turns:
            turns = range(at, at + count)
            at += count
            messages = tuple(m for turn in turns for m in reader.example(turn).messages)
            images = tuple(image for turn in turns for image in reader.image_files(turn))
            yield Record(messages, None, images, {})

    write_shards(records(), directory)


def samples_that_fit(config: Config, pad_for: str) -> int:
    """Return how many conversations of the "longest" or the "mean" length fit, a power of two."""
    samples = Samples(config, config.data.train, make_processor(config))
    lengths = [len(samples.conversation(index).token_ids) for index in range(len(samples))]
    length = max(lengths) if pad_for == "longest" else statistics.mean(lengths)
    return 2 ** int(math.log2(config.data.pack_tokens / length))


def start_side(side: str, padded: int, settings: list[str], directory: Path) -> list[Any]:
    """Run one side in a process of its own; return tokens and seconds of its counted steps."""
    result = directory / "steps.json"
    python = trl_python() if side == "trainer" else sys.executable
    command = [python, __file__, "--side", side, str(padded), json.dumps(settings), str(result)]
    threads = load_config(None, settings).launch.threads
    environment = {**os.environ, **rank_environment(LaunchConfig(threads=threads), 1)}
    environment["PYTHONPATH"] = str(ROOT)
    subprocess.run(command, check=True, cwd=directory, env=environment, stdout=sys.stderr)
    return json.loads(result.read_text())[WARM_UP_STEPS:]


def rate(steps: list[tuple[int, float]]) -> float:
    """Return tokens per second over steps."""
    return sum(tokens for tokens, _ in steps) / sum(seconds for _, seconds in steps)


def main() -> None:
    """Let the sides take turns; print rates and ratios as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--turns", type=int, default=8, help="most turns per conversation; 1: as in the demo")
    add("--hidden-size", type=int, default=128, help="of the digits model")
    add("--pack-tokens", type=int, default=2048, help="budget of a packed micro-batch")
    add("--pad-for", choices=("longest", "mean"), default="longest", help="length that must fit")
    add("--samples", type=int, default=64, help="conversations per update")
    add("--threads", type=int, default=1, help="threads of each side's one process")
    add("--steps", type=int, default=10, help="counted steps per side and round")
    add("--rounds", type=int, default=3, help="rounds; the sides take turns")
    add("--result", type=Path, help="also write the JSON to this file")
    add("--side", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        side, padded, settings, result = arguments.side
        run_side(side, int(padded), json.loads(settings), Path(result))
        return
    found: dict[str, list[list[Any]]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        from megatron_sr1.demo.digits import corpus_texts
        from megatron_sr1.demo.tiny_model import make_tiny_model

        make_tiny_model(directory / "model", corpus_texts(), hidden_size=arguments.hidden_size)
        num_steps = arguments.steps + WARM_UP_STEPS
        num_samples = arguments.samples * num_steps
        write_conversations(directory / "data", directory / "digits", num_samples, arguments.turns)
        tokens = arguments.pack_tokens
        overrides = [
            *("stage=sft", "model.dtype=float32", f"model.path={directory / 'model'}"),
            *(f"data.train={directory / 'data'}", f"output={directory / 'run'}"),
            *(f"data.pack_tokens={tokens}", f"data.max_prompt_tokens={tokens}"),
            *("data.min_pixels=784", "data.max_pixels=200704"),
            *(f"data.prompts_per_step={arguments.samples}", f"optimizer.num_steps={num_steps}"),
            *("optimizer.learning_rate=1e-3", "checkpoint.every_steps=0"),
            *("launch.device=cpu", f"launch.threads={arguments.threads}"),
        ]
        padded = samples_that_fit(load_config(None, overrides), arguments.pad_for)
        for number in range(arguments.rounds):
            for side in SIDES:
                found[side].append(start_side(side, padded, overrides, directory))
                tokens_per_second = rate(found[side][-1])
                print(f"round {number + 1}: {side} {tokens_per_second:.0f} tokens/s", flush=True)
    rates = {side: [rate(steps) for steps in rounds] for side, rounds in found.items()}
    ratios = {
        other: [mine / its for mine, its in zip(rates["packed"], rates[other], strict=True)]
        for other in SIDES[1:]
    }
    summary = {
        "settings": {k: v for k, v in vars(arguments).items() if k not in ("result", "side")},
        "tokens_per_second": rates,
        "packed_over_by_round": ratios,
        "packed_over": {other: statistics.median(values) for other, values in ratios.items()},
    }
    report(summary, arguments.result)


if __name__ == "__main__":
    main()
