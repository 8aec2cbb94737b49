"""GRPO and evaluation through the command line, on two ranks with the real engine, few samples.

Not covered: that anything is learnt (the demo's slow test does that).
"""

import gzip
import json
from operator import itemgetter
from pathlib import Path

import pytest

from megatron_sr1.data.shards import ShardReader
from megatron_sr1.demo.digits import make_digits
from megatron_sr1.observability.metrics import read_lines
from tests.wandb_runs import history, read_table

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def run(tiny_model, join_as_ranks, tmp_path_factory):
    """Two GRPO steps of two updates each, with a reference model, from random weights."""
    folder = tmp_path_factory.mktemp("stages")
    shards = make_digits(folder, 1, num_train=24, num_eval=12, num_cold_start=1)
    join_as_ranks(
        *(2, "train", ROOT / "examples" / "digits_cpu.yaml", f"model.path={tiny_model}"),
        *(f"data.train={shards['train']}", "evaluation.at_start=true"),
        *(f"evaluation.sets.{way}.path={shards['eval']}" for way in ("greedy", "sampled")),
        "evaluation.sets.sampled.temperature=0.9",
        *(f"output={folder / 'run'}", "optimizer.num_steps=2", "data.prompts_per_step=6"),
        *("algorithm.prompts_per_update=3", "algorithm.kl_coefficient=0.01"),
        *("rollout.samples_per_prompt=4", "rollout.temperature=0.9", "logging.wandb=offline"),
        *("logging.profile_steps=[2,2]", "logging.profile_ranks=[0,1]"),
        *("checkpoint.every_steps=1", "checkpoint.keep_last=1", "checkpoint.keep_best=1"),
        "checkpoint.best_by=max description_exact",
    )
    return folder / "run"


def steps(run):
    """Metrics of the steps, without the evaluation at the start."""
    return read_lines(run / "metrics.jsonl")[1:]


def test_metrics_tell_every_step_and_engine_and_actor_agree(run):
    lines = read_lines(run / "metrics.jsonl")
    assert [(line["stage"], line["step"]) for line in lines] == [("grpo", s) for s in range(3)]
    assert "evaluation/greedy/accuracy" in lines[0] and "reward/total" not in lines[0]
    lines = steps(run)
    for line in lines:
        assert 0 < line["mismatch/abs_max"] < 1e-3
        assert line["optimizer/grad_norm"] >= 0 and "actor/reference_kl" in line
        assert line["time/pass1_seconds"] > 0 and line["time/sync_seconds"] > 0
        for name in ("accuracy", "format", "self_reward", "total"):
            assert f"reward/{name}" in line


def test_throughput_is_told_by_phase_and_no_mfu_of_a_cpu(run):
    for line in steps(run):
        seconds = line["time/pass1_seconds"] + line["time/pass2_seconds"]
        sampled = line["rollout/response_tokens"] + line["rollout/reading_tokens"]
        assert line["perf/rollout_tokens_per_second"] == pytest.approx(sampled / seconds)
        rates = {name: line[f"perf/{name}_tflops_per_rank"] for name in ("update", "reference")}
        work = {name: rate * line[f"time/{name}_seconds"] for name, rate in rates.items()}
        assert work["update"] == pytest.approx(3 * work["reference"]) and work["update"] > 0
        assert line["perf/old_logprobs_tokens_per_second"] > line["perf/step_tokens_per_second"] > 0
        assert not [name for name in line if name.endswith("_mfu")]


def test_wandb_holds_the_same_numbers_and_samples_with_their_images(run):
    told, lines = history(run, 3), read_lines(run / "metrics.jsonl")
    for (step, values), line in zip(told, lines, strict=True):
        assert step == line.pop("step") and line.pop("stage") == "grpo"
        assert line.items() <= values.items()
    columns, rows = read_table(run, told[1][1]["samples"])
    assert len(rows) == 8 and len({row[columns.index("question")] for row in rows}) > 1
    rollouts = read_lines(run / "rollouts/step_1.jsonl")
    shards = ShardReader(json.loads((run / "config.json").read_text())["data"]["train"])
    for row, rollout in zip(rows, rollouts[::3], strict=True):
        (image,) = shards.images(rollout["index"])
        assert row[0].tobytes() == image.tobytes()
        assert row[columns.index("response")] == rollout["response"]
    assert list((run / "wandb" / "artifacts" / "staging").iterdir()), "not with the run"
    (_, *right), (_, *wrong) = read_table(run, told[1][1]["verdicts"])[1]
    judged = [r for r in map(itemgetter("reward"), rollouts) if r["self_reward"] is not None]
    assert [sum(right), sum(wrong)] == [sum(r["accuracy"] == a for r in judged) for a in (1, 0)]


def test_memory_is_told_by_phase_and_the_profile_names_the_phases(run):
    for line in steps(run):
        for phase in ("pass1", "update", "sync"):
            assert line[f"memory/{phase}_host_gib"] <= line["memory/host_peak_gib"]
    files = sorted((run / "profile").iterdir())
    assert [f.name for f in files] == [f"rank_{r}_steps_2_2.json.gz" for r in (0, 1)]
    for file in files:
        events = json.loads(gzip.open(file).read())["traceEvents"]
        assert {"pass1", "update", "sync"} <= {event.get("name") for event in events}


def test_every_rollout_is_saved_with_its_group_and_weight_version(run):
    seen = []
    for step in (1, 2):
        lines = read_lines(run / f"rollouts/step_{step}.jsonl")
        assert len(lines) == 6 * 4 and {line["weight_version"] for line in lines} == {step - 1}
        assert [line["sample"] for line in lines] == [0, 1, 2, 3] * 6
        seen += [line["index"] for line in lines[::4]]
        for start in range(0, len(lines), 4):
            group = lines[start : start + 4]
            assert len({line["index"] for line in group}) == 1
            assert sum(line["advantage"] for line in group) == pytest.approx(0, abs=1e-4)
    assert len(set(seen)) == 12


def test_run_leaves_checkpoint_export_evaluation_report_and_wandb_files(run):
    assert (run / "checkpoints" / "latest").read_text().strip() == "step_2"
    assert (run / "hf" / "model.safetensors").is_file()
    assert 'class="chart"' in (run / "report.html").read_text()
    summary = json.loads((run / "summary.json").read_text())
    for way in ("sampled", "greedy"):
        lines = read_lines(run / "eval" / f"{way}.jsonl")
        assert [line["index"] for line in lines] == list(range(12))
        assert summary[way]["accuracy"] == sum(line["accuracy"] for line in lines) / 12


def test_each_save_was_evaluated_and_the_best_one_kept(run):
    """Random weights describe nothing: of equal ones the later is the better."""
    for line, file in zip(
        read_lines(run / "metrics.jsonl"), ("_step_0", "_step_1", ""), strict=True
    ):
        for name in ("greedy", "sampled"):
            lines = read_lines(run / f"eval/{name}{file}.jsonl")
            for rate in ("accuracy", "description_exact"):
                found = line[f"evaluation/{name}/{rate}"]
                assert found == sum(answer[rate] for answer in lines) / 12
            assert line[f"evaluation/{name}/questions"] == 12
        assert line["step"] == 0 or line["time/evaluate_seconds"] > 0
    assert not list((run / "eval").glob("*.partial"))
    assert [path.name for path in (run / "checkpoints").glob("step_*")] == ["step_2"]
    state = json.loads((run / "checkpoints" / "step_2" / "state.json").read_text())["state"]
    assert state["evaluation"]["description_exact"] == 0


def test_evaluation_of_the_checkpoint_gives_what_the_run_gave(run, join_as_ranks):
    again = run.parent / "again"
    sets = json.loads((run / "config.json").read_text())["evaluation"]["sets"]
    join_as_ranks(
        *(2, "eval", ROOT / "examples" / "digits_cpu.yaml", f"model.path={run / 'checkpoints'}"),
        *(f"evaluation.sets.{way}.path={sets[way]['path']}" for way in sets),
        *(f"output={again}", "evaluation.sets.sampled.temperature=0.9"),
        "evaluation.chunk_prompts=5",
    )
    for way in ("sampled", "greedy"):
        assert read_lines(again / f"eval/{way}.jsonl") == read_lines(run / f"eval/{way}.jsonl")
