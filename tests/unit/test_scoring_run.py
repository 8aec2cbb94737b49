"""A real run in which some prompts take the grader too long: excluded, counted, resumed.

Half of the questions have a formula as gold answer, and the time limit is a microsecond, so that
each answer that needs algebra exceeds it. Not covered: a slow answer that a policy sampled.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_sr1.data.examples import Record
from megatron_sr1.data.shards import ShardReader, write_shards
from megatron_sr1.demo.digits import make_digits
from megatron_sr1.observability.metrics import read_lines

ROOT = Path(__file__).resolve().parents[2]


def train(*arguments, check=True):
    command = [sys.executable, "-m", "megatron_sr1", "train", "examples/digits_cpu.yaml"]
    done = subprocess.run(
        [*command, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=500
    )
    assert not check or done.returncode == 0, done.stderr[-4000:]
    return done


def with_formulas(directory, target):
    """The same questions; the gold answer of each second one is a root that no box will equal."""
    reader = ShardReader(directory)
    records = []
    for index in range(len(reader)):
        example = reader.example(index)
        gold = example.answer if index % 2 else rf"{example.answer}+\sqrt{{2}}"
        images = reader.images(index)
        records.append((example, gold, images))
    write_shards((make_record(*record) for record in records), target)
    return target


def make_record(example, gold, images):
    import io

    pictures = []
    for image in images:
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        pictures.append(buffer.getvalue())
    return Record(example.messages, gold, tuple(pictures), dict(example.metadata))


@pytest.fixture(scope="module")
def run(tiny_model, tmp_path_factory):
    """A short cold start, two GRPO steps, and a third one after resuming."""
    folder = tmp_path_factory.mktemp("ungraded")
    shards = make_digits(folder, 1, num_train=24, num_eval=6, num_cold_start=2048)
    train(
        *("stage=sft", f"model.path={tiny_model}", f"data.train={shards['cold_start']}"),
        *("evaluation.sets=", f"output={folder / 'cold'}", "data.prompts_per_step=32"),
        *("optimizer.num_steps=80", "optimizer.learning_rate=2e-3", "checkpoint.every_steps=0"),
    )
    mixed = with_formulas(shards["train"], folder / "mixed")
    held_out = with_formulas(shards["eval"], folder / "held_out")
    grpo = (
        *(
            f"model.path={folder / 'cold' / 'hf'}",
            f"data.train={mixed}",
            f"output={folder / 'run'}",
        ),
        *("data.prompts_per_step=6", "algorithm.prompts_per_update=3", "checkpoint.every_steps=1"),
        *("rollout.samples_per_prompt=4", "reward.grader_timeout_seconds=1e-6"),
    )
    first = train(*grpo, "evaluation.sets=", "optimizer.num_steps=2")
    sets = [f"evaluation.sets.{way}.path={held_out}" for way in ("greedy", "sampled")]
    train(*grpo, *sets, "optimizer.num_steps=3")
    return folder, grpo, first


@pytest.mark.slow
def test_a_run_excludes_and_counts_what_takes_the_grader_too_long(run):
    folder, grpo, first = run
    lines = read_lines(folder / "run" / "metrics.jsonl")
    counts = [line["reward/ungraded"] for line in lines]
    assert [line["step"] for line in lines] == [1, 2, 3]
    # Formulas are half of the questions: some were met, none more than once, and the count goes on.
    assert 0 < counts[1] <= counts[2] <= 12 and counts == sorted(counts)
    dropped = 0
    for step in (1, 2, 3):
        kept = read_lines(folder / "run" / f"rollouts/step_{step}.jsonl")
        assert [line["sample"] for line in kept] == [0, 1, 2, 3] * (len(kept) // 4)
        dropped += 6 - len(kept) // 4
        assert all(line["reward"]["accuracy"] == 0 for line in kept if "sqrt" in line["gold"])
    assert dropped == counts[2]
    assert "left out with its group:" in first.stderr and "rollout " in first.stderr


@pytest.mark.slow
def test_evaluation_excludes_such_questions_and_counts_them(run):
    import json

    folder, _, _ = run
    summary = json.loads((folder / "run" / "summary.json").read_text())
    for way in ("sampled", "greedy"):
        lines = read_lines(folder / "run" / "eval" / f"{way}.jsonl")
        assert summary[way]["ungraded"] == 6 - len(lines) > 0
        assert summary[way]["accuracy"] == sum(line["accuracy"] for line in lines) / len(lines)


@pytest.mark.slow
def test_too_many_stop_the_run_with_a_one_line_error(run):
    folder, grpo, _ = run
    done = train(
        *grpo,
        "evaluation.sets=",
        "optimizer.num_steps=5",
        "reward.max_ungraded_share=0",
        check=False,
    )
    assert done.returncode == 2
    assert "at most a share of 0 may (reward.max_ungraded_share)" in done.stderr
