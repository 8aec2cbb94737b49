"""A rank of `megatron-sr1 train` whose policy writes what a file holds.

Run as a script under torchrun: FILE.json, then arguments of the command. The file maps a gold
answer to the answers that are put into boxes, in turn. Tokens, logprobs, the grader, rewards and
the update are the real ones; the texts alone are exchanged, before the verdicts.
"""

import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path

from megatron_sr1 import cli
from megatron_sr1.records import Completion, Reading
from megatron_sr1.rollout import two_pass as module


def exchange(answers):
    """Have the texts of rollouts exchanged before they are graded."""
    turns = {gold: itertools.cycle(texts) for gold, texts in answers.items()}
    real = module._rollout

    def rollout(sample, *arguments):
        return written(real(sample, *arguments), turns[sample.prompt.example.answer])

    module._rollout = rollout


def written(rollout, texts):
    """The same rollout with an answer in its box, in its description, and read from it."""
    answer = next(texts)
    text = f"<description> {answer} </description> <think> so </think> \\boxed{{{answer}}}"
    read = Completion((1,), (-0.5,), f"<think> so </think> \\boxed{{{answer}}}", "stop")
    return replace(
        rollout,
        completion=replace(rollout.completion, text=text),
        description=answer,
        reading=Reading((read,)),
    )


if __name__ == "__main__":
    exchange(json.loads(Path(sys.argv[1]).read_text()))
    sys.exit(cli.main(sys.argv[2:]))
