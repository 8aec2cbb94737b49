"""Tokens a second of supervised fine-tuning: packed, padded, and by transformers' Trainer.

All sides learn from the same conversations about digits, on the same model, from random weights,
with the same samples an update and as many threads, and take turns in rounds. Lengths are mixed: a
conversation joins one to `--turns` turns of the demo's cold start, each with its image. Padded
micro-batches, ours and the Trainer's, are filled up to their longest; they hold as many samples as
fit the budget of the packed ones, were all as long as the longest of the data (`--pad-for`).
Counted are the conversations' own tokens, images expanded. The first steps of a round are left
out. The Trainer runs in the environment of compare_trl.py.

    python tools/compare_sft.py
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from megatron_sr1.config.run import LaunchConfig  # noqa: E402
from megatron_sr1.launch.torchrun import rank_environment  # noqa: E402
from tools.compare_trl import report, trl_python  # noqa: E402
from tools.sft_sides import SIDES, Job, config_of  # noqa: E402

WARM_UP_STEPS = 2


def write_conversations(directory: Path, work: Path, num_samples: int, max_turns: int) -> None:
    """Shards of conversations of one to `max_turns` turns, each as often."""
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


def padded_samples(job: Job, pad_for: str) -> int:
    """Conversations of a padded micro-batch: as many as the budget holds, a power of two.

    Args:
        job: with the data and the budget.
        pad_for: all are taken to be as long as the "longest" of the data or the "mean".
    """
    from megatron_sr1.trainer.samples import Samples, make_processor

    config = config_of(job)
    samples = Samples(config, job.data, make_processor(config))
    lengths = [len(samples.conversation(index).token_ids) for index in range(len(samples))]
    length = max(lengths) if pad_for == "longest" else statistics.mean(lengths)
    return 2 ** int(math.log2(job.pack_tokens / length))


def run_side(side: str, job: Job, folder: Path) -> list[tuple[int, float]]:
    """One side in a process of its own: own tokens and seconds of each step."""
    asked, told = folder / "job.json", folder / "steps.json"
    asked.write_text(json.dumps(vars(job)))
    python = trl_python() if side == "trainer" else sys.executable
    command = [python, str(ROOT / "tools" / "sft_sides.py"), side, str(asked), str(told)]
    environment = {**os.environ, **rank_environment(LaunchConfig(threads=job.num_threads), 1)}
    environment["PYTHONPATH"] = str(ROOT)
    subprocess.run(command, check=True, cwd=folder, env=environment, stdout=sys.stderr)
    return [(tokens, seconds) for tokens, seconds in json.loads(told.read_text())][WARM_UP_STEPS:]


def rate(steps: list[tuple[int, float]]) -> float:
    """Tokens a second over steps."""
    return sum(tokens for tokens, _ in steps) / sum(seconds for _, seconds in steps)


def main() -> int:
    """Let the sides take turns; print rates and ratios as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--turns", type=int, default=8, help="most turns of a conversation; 1: the demo's own")
    add("--hidden-size", type=int, default=128, help="of the digits model")
    add("--pack-tokens", type=int, default=2048, help="budget of a packed micro-batch")
    add("--pad-for", choices=("longest", "mean"), default="longest", help="length that must fit")
    add("--samples", type=int, default=64, help="conversations an update")
    add("--threads", type=int, default=1, help="of each side's one process")
    add("--steps", type=int, default=10, help=f"of a side in a round, beside {WARM_UP_STEPS} first")
    add("--rounds", type=int, default=3, help="in which the sides take turns")
    add("--result", type=Path, help="write the JSON here too")
    arguments = parser.parse_args()
    found: dict[str, list[list[tuple[int, float]]]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        from megatron_sr1.demo.digits import corpus_texts
        from megatron_sr1.demo.tiny_model import make_tiny_model

        make_tiny_model(folder / "model", corpus_texts(), hidden_size=arguments.hidden_size)
        num_steps = arguments.steps + WARM_UP_STEPS
        num_samples = arguments.samples * num_steps
        write_conversations(folder / "data", folder / "digits", num_samples, arguments.turns)
        job = Job(
            model=str(folder / "model"),
            data=str(folder / "data"),
            output=str(folder / "run"),
            pack_tokens=arguments.pack_tokens,
            samples_per_step=arguments.samples,
            num_steps=num_steps,
            num_threads=arguments.threads,
        )
        job = replace(job, padded_samples=padded_samples(job, arguments.pad_for))
        for number in range(arguments.rounds):
            for side in SIDES:
                found[side].append(run_side(side, job, folder))
                print(
                    f"round {number + 1}: {side} {rate(found[side][-1]):.0f} tokens/s", flush=True
                )
    told = {side: [rate(steps) for steps in rounds] for side, rounds in found.items()}
    ratios = {
        other: [mine / its for mine, its in zip(told["packed"], told[other], strict=True)]
        for other in SIDES[1:]
    }
    summary = {
        "settings": {k: v for k, v in vars(arguments).items() if k != "result"},
        "tokens_per_second": told,
        "packed_over_by_round": ratios,
        "packed_over": {other: statistics.median(values) for other, values in ratios.items()},
    }
    report(summary, arguments.result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
