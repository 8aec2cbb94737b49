"""Ten GRPO steps whose policy writes adversarial texts, through the real grader and trainer.

Not covered: a policy that learns to write such texts by itself.
"""

import json
from pathlib import Path

import pytest

from megatron_sr1.data.examples import Record
from megatron_sr1.data.shards import ShardReader, write_shards
from megatron_sr1.demo.digits import make_digits
from megatron_sr1.observability.metrics import read_lines
from tests.grading_attacks import CASES as ATTACKS
from tests.grading_field import CASES, COLUMN, CUBES, TINY, TWO_ROOTS
from tests.grading_raising import RAISING

pytestmark = [pytest.mark.field, pytest.mark.slow]

SCRIPT = Path(__file__).parent / "ranks" / "adversarial.py"
GOLDS = list(
    dict.fromkeys(
        ("x \\neq 5", "1<x<3", TINY, COLUMN, TWO_ROOTS, CUBES, *(gold for gold, _ in RAISING))
    )
)
HANGS = "(x+y+z)^{99}"
STEPS, PROMPTS, SAMPLES = 10, 6, 4


def with_golds(directory, target):
    """The digits with other gold answers."""
    reader = ShardReader(directory)
    examples = [reader.example(index) for index in range(len(reader))]
    records = [
        Record(e.messages, GOLDS[n % len(GOLDS)], tuple(reader.image_files(n)), dict(e.metadata))
        for n, e in enumerate(examples)
    ]
    write_shards(records, target)
    return target


def answers():
    """What is written where a gold answer is asked for: its own answers first."""
    attacks = [case[1] for case in ATTACKS if len(case[1]) < 5000]
    own = {gold: [c[1] for c in CASES if c[0] == gold] for gold in GOLDS}
    for gold, answer in RAISING:
        own[gold] = [answer, *own[gold]]
    own["5"].insert(2, HANGS)
    return {gold: [*own[gold], *attacks] for gold in GOLDS}


@pytest.fixture(scope="module")
def run(tiny_model, run_ranks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adversarial")
    shards = make_digits(folder, 1, num_train=60, num_eval=1, num_cold_start=1)
    (folder / "answers.json").write_text(json.dumps(answers()))
    done = run_ranks(
        *(SCRIPT, 1, folder / "answers.json", "train", "examples/digits_cpu.yaml"),
        *(f"model.path={tiny_model}", f"data.train={with_golds(shards['train'], folder / 'odd')}"),
        *("evaluation.sets=", f"output={folder / 'run'}", f"optimizer.num_steps={STEPS}"),
        *(f"data.prompts_per_step={PROMPTS}", f"algorithm.prompts_per_update={PROMPTS}"),
        *(f"rollout.samples_per_prompt={SAMPLES}", "rollout.max_response_tokens=8"),
        *("rollout.max_reading_tokens=8", "reward.grader_timeout_seconds=2"),
        *("checkpoint.every_steps=0", "checkpoint.export_hf=false", "launch.num_processes=1"),
        timeout=560,
    )
    return folder / "run", done.stdout


def test_ten_steps_end_well_and_count_what_was_written(run):
    folder, output = run
    lines = read_lines(folder / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    graded = [len(read_lines(folder / f"rollouts/step_{n}.jsonl")) for n in range(1, STEPS + 1)]
    raised = [line["reward/uncomparable"] for line in lines]
    shares = [line["reward/ungraded_share"] for line in lines]
    assert sum(raised) > 0 and sum(shares) > 0
    for count, share in zip(graded, shares, strict=True):
        assert count == SAMPLES * round(PROMPTS * (1 - share)) or share == 1
    assert lines[-1]["reward/ungraded"] == round(PROMPTS * sum(shares))
    assert "counted as wrong, as reading or comparing it raised: " in output
    assert "left out with its group: " in output and "prompts of this step could not be" in output


def test_each_rollout_says_what_it_raised_and_is_wrong(run):
    folder, _ = run
    lines = [
        line
        for n in range(1, STEPS + 1)
        for line in read_lines(folder / f"rollouts/step_{n}.jsonl")
    ]
    odd = [line for line in lines if line["reward"]["uncomparable"]]
    told = sum(line["reward/uncomparable"] for line in read_lines(folder / "metrics.jsonl"))
    assert len(odd) == told and all(line["reward"]["accuracy"] == 0 for line in odd)
    verdicts = {case[:2]: case[3] for case in CASES}
    judged = [line for line in lines if (line["gold"], line["reward"]["answer"]) in verdicts]
    assert len(judged) > 20
    for line in judged:
        pair = line["gold"], line["reward"]["answer"]
        assert line["reward"]["accuracy"] == verdicts[pair], pair
