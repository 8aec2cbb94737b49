"""Grading of a step's 4,000 answers: while the engine samples them, and afterwards, in turn.

Makes its model and images itself. The engine samples 50 prompts x 80 responses; each response is
exchanged for an answer with a known gold one, of which one in ten is a formula. Measured within one
run: pass 1, then grading one answer after the other in this process, as a step did before; and
pass 1 with the grading processes at work, then what is left of the grading. Both give the same
rewards, or it fails. Wall seconds, as the point is what a step waits for. Writes a JSON file. One
process, started by bench.py, with OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_sr1.config.rollout import RewardConfig, RolloutConfig
from megatron_sr1.records import Message, Prompt, Rollout
from megatron_sr1.rewards.answered import Finished
from megatron_sr1.rewards.grading_pool import GradingPool
from megatron_sr1.rewards.score import Scorer
from megatron_sr1.rollout.readings import RolloutHooks
from megatron_sr1.rollout.two_pass import roll_out
from megatron_sr1.runtime.rng import request_seed
from tools.bench_host import RESPONSE_TOKENS, Bench
from tools.grading_rate import make_answer

NUM_PROMPTS, SAMPLES = 50, 80
LIVE_SEQUENCES = 256
ROUNDS = 3
REWARD = RewardConfig("vision_r1", grader_timeout_seconds=60.0)
LIMITS = {"left_share": 0.20, "step": 1.0}
"""Seconds of grading left after the last token over those of grading one after the other; seconds
of pass 1 and grading together, over the same when grading begins after pass 1."""


class Step:
    """Both passes through a step's grading, with answers that no other step has."""

    def __init__(self, bench: Bench, number: int, pool: GradingPool, scorer: Scorer) -> None:
        """Draw the answers of a step."""
        self._bench, self._pool, self._scorer = bench, pool, scorer
        self._chance, self._first = random.Random(number), number * NUM_PROMPTS * SAMPLES
        places = range(NUM_PROMPTS * SAMPLES)
        self._answers = [make_answer(self._first + place, self._chance) for place in places]
        self._prompts = [bench.samples["small"].prompt(index) for index in range(NUM_PROMPTS)]

    def exchanged(self, rollouts: Sequence[Rollout]) -> list[Finished]:
        """Return rollouts with the answers of this step in their place."""
        found = []
        for rollout in rollouts:
            gold, answer, question = self._answers[rollout.index * SAMPLES + rollout.sample]
            text = f"<think> so </think> \\boxed{{{answer}}}"
            written = replace(rollout, completion=replace(rollout.completion, text=text))
            own = self._prompts[rollout.index].example
            example = replace(own, answer=gold, messages=(Message("user", question),))
            found.append(Finished(f"answer {rollout.index} {rollout.sample}", written, example))
        return found

    def roll(self, prompts: Sequence[Prompt], is_early: bool) -> tuple[list[Rollout], float]:
        """Return the rollouts of pass 1 and its seconds; with `is_early`, they are submitted."""

        def submit(rollouts: Sequence[Rollout]) -> None:
            self._pool.submit(self.exchanged(rollouts), SAMPLES)

        self._bench.reset()
        started = time.perf_counter()
        rollouts, _ = roll_out(
            self._bench.engine,
            prompts,
            RolloutConfig(samples_per_prompt=SAMPLES, max_response_tokens=RESPONSE_TOKENS),
            RolloutHooks(
                lambda text: None,
                None,
                lambda index, sample, part: request_seed(1, 0, index, sample, part),
                finished=submit if is_early else None,
            ),
        )
        return rollouts, time.perf_counter() - started

    def measure(self) -> dict[str, float]:
        """Grade after pass 1, then during it; return the seconds of each part."""
        rollouts, after_pass1 = self.roll(self._prompts, is_early=False)
        finished = self.exchanged(rollouts)
        started = time.perf_counter()
        wanted = self._scorer.results(finished)
        after_reward = time.perf_counter() - started
        rollouts, early_pass1 = self.roll(self._prompts, is_early=True)
        finished = self.exchanged(rollouts)
        started = time.perf_counter()
        found = self._pool.results(finished)
        early_reward = time.perf_counter() - started
        assert found == wanted, "grading early gave other rewards"
        return {
            "after_pass1_seconds": after_pass1,
            "after_reward_seconds": after_reward,
            "early_pass1_seconds": early_pass1,
            "early_reward_seconds": early_reward,
        }


def measure(bench: Bench, num_rounds: int, workers: int) -> dict[str, Any]:
    """Measure some steps after one to warm up; return the medians, and ratios of them."""
    with GradingPool(replace(REWARD, workers=workers)) as pool, Scorer(REWARD) as scorer:
        rounds = [Step(bench, n, pool, scorer).measure() for n in range(num_rounds + 1)][1:]
    found: dict[str, Any] = {
        name: statistics.median(each[name] for each in rounds) for name in rounds[0]
    }
    before = found["after_pass1_seconds"] + found["after_reward_seconds"]
    now = found["early_pass1_seconds"] + found["early_reward_seconds"]
    left = found["early_reward_seconds"] / found["after_reward_seconds"]
    return {**found, "left_share": left, "step": now / before, "rounds": rounds}


def main() -> int:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--result", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--workers", type=int, default=REWARD.workers)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        bench = Bench(Path(directory), LIVE_SEQUENCES)
        found = measure(bench, arguments.rounds, arguments.workers)
    arguments.result.write_text(json.dumps(found, indent=2) + "\n")
    print(arguments.result.read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
