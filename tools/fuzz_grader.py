"""Fuzz the grader with answers that a policy could write: tools/fuzz_grader.py --count 20000.

Answers come from tests/hostile/grader_answers.py; golds are taken in turn, so that all meet equally
many answers. Each goes through the whole scorer, as the box of pass 1, as a description and as the
box of pass 2. Prints counts, the slowest comparison, and each kind of exception that an answer
raised, with an answer that raised it. The exit status is 1 if an exception left the scorer or
something exceeded its time limit.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from megatron_sr1.config.rollout import RewardConfig
from megatron_sr1.errors import GradingLimit
from megatron_sr1.records import Completion, Reading
from megatron_sr1.rewards.score import Scorer
from tests.hostile.grader_answers import CASES, make_answer
from tests.rollout_case import case

RULES_SECONDS = 1.0
"""Limit of the processor time that the rules take for one rollout, in this process."""
START_SECONDS = 60.0
"""Limit of the start of a new grading process, on a busy machine."""


@dataclass
class Found:
    """Counts over the scored rollouts.

    Attributes:
        limits: rollouts that reached a limit of the grader.
        raised: kind of exception that a library raised -> number of rollouts.
        examples: kind of exception -> a rollout.
        slowest_seconds: the slowest rollout, including a time-out and the start of a process.
        slowest_rules_seconds: largest processor time of a rollout's rules.
        failures: exceptions that left the scorer, and exceeded limits.
    """

    count: int = 0
    right: int = 0
    limits: int = 0
    raised: Counter[str] = field(default_factory=Counter)
    examples: dict[str, dict[str, str]] = field(default_factory=dict)
    slowest_seconds: float = 0.0
    slowest_rules_seconds: float = 0.0
    failures: list[str] = field(default_factory=list)


def fuzz(
    seed: int, count: int, num_golds: int, timeout_seconds: float, say: Callable[[str], None]
) -> Found:
    """Score `count` rollouts of mutated answers."""
    chance, found = random.Random(seed), Found()
    unique = list({case[0]: case for case in CASES}.values())
    golds = chance.sample(unique, min(num_golds, len(unique)))
    reported = time.monotonic()
    with Scorer(RewardConfig("vision_sr1", grader_timeout_seconds=timeout_seconds)) as scorer:
        scorer.score("start", *case(r"\boxed{1+x}", "x+1"))
        for number in range(count):
            gold, _, question, _, _ = golds[number % len(golds)]
            answer, read = make_answer(chance, gold), make_answer(chance, gold)
            sample = {"gold": gold, "question": question, "answer": answer, "read": read}
            _score(scorer, found, sample, timeout_seconds)
            if time.monotonic() - reported > 30:
                reported = time.monotonic()
                say(f"{number + 1}: {found.limits} limits, {sum(found.raised.values())} raised")
    return found


def _score(scorer: Scorer, found: Found, sample: dict[str, str], timeout_seconds: float) -> None:
    read = sample["read"]
    response = f"<description> {read} </description> <think> so </think> "
    response += f"\\boxed{{{sample['answer']}}}"
    second = Completion((1,), (-0.5,), f"<think> so </think> \\boxed{{{read}}}", "stop")
    wall, own = time.monotonic(), time.process_time()
    found.count += 1
    try:
        reading = Reading((second,))
        rollout = case(response, sample["gold"], sample["question"], read, reading, True)
        reward = scorer.score("fuzz", *rollout)
        found.right += reward.accuracy == 1.0
        if reward.uncomparable is not None:
            kind = reward.uncomparable.split(":")[0]
            found.raised[kind] += 1
            found.examples.setdefault(kind, sample | {"raised": reward.uncomparable})
    except GradingLimit:
        found.limits += 1
    except Exception as error:  # any exception is a failure
        name = type(error).__name__
        found.failures.append(f"{name}: {error} left the scorer: {json.dumps(sample)}")
    wall, own = time.monotonic() - wall, time.process_time() - own
    found.slowest_seconds = max(found.slowest_seconds, wall)
    found.slowest_rules_seconds = max(found.slowest_rules_seconds, own)
    if wall > 2 * timeout_seconds + START_SECONDS or own > RULES_SECONDS:
        took = f"took {wall:.1f} s, {own:.2f} s of it in the rules"
        found.failures.append(f"{took}: {json.dumps(sample)}")


def main(arguments: list[str] | None = None) -> int:
    """Run the tool; return its exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=20_000, help="number of answers")
    parser.add_argument("--golds", type=int, default=200, help="number of gold answers")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--timeout", type=float, default=5.0, help="seconds per comparison")
    parser.add_argument("--examples", type=Path, help="file for an example of each exception")
    options = parser.parse_args(arguments)
    began = time.monotonic()
    found = fuzz(options.seed, options.count, options.golds, options.timeout, print)
    for failure in found.failures:
        print(f"failure: {failure[:1000]}")
    for kind, times in found.raised.most_common():
        print(f"{times} raised {kind}, for example {json.dumps(found.examples[kind])[:400]}")
    if options.examples:
        lines = (json.dumps(example) + "\n" for example in found.examples.values())
        options.examples.write_text("".join(lines))
    print(
        f"seed {options.seed}: {found.count} answers against {options.golds} golds in "
        f"{time.monotonic() - began:.0f} s: {found.right} right, {found.limits} limits, "
        f"{sum(found.raised.values())} raised; the slowest took {found.slowest_seconds:.1f} s, its "
        f"rules {found.slowest_rules_seconds:.2f} s; {len(found.failures)} failures"
    )
    return 1 if found.failures else 0


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)
    sys.exit(main())
