"""An evaluation by the real engine is killed in the middle, and the same command goes on."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from megatron_sr1.demo.digits import make_digits
from megatron_sr1.observability.metrics import read_lines
from tests.ranks import ROOT

NUM_QUESTIONS, CHUNK = 48, 4
SECONDS = 900


@pytest.fixture(scope="module")
def runs(tiny_model, tmp_path_factory):
    """The folder of an undisturbed evaluation, a killed and a continued one; lines at the kill."""
    folder = tmp_path_factory.mktemp("evaluations")
    shards = make_digits(folder, 1, num_train=1, num_eval=NUM_QUESTIONS, num_cold_start=1)

    def start(name, output):
        arguments = [
            *("eval", "examples/digits_cpu.yaml", f"model.path={tiny_model}"),
            *("evaluation.sets=", f"evaluation.sets.held.path={shards['eval']}"),
            *("evaluation.temperature=1.0", "evaluation.samples_per_prompt=2"),
            *(f"evaluation.chunk_prompts={CHUNK}", f"output={folder / output}"),
            *("launch.num_processes=1", "logging.progress=false"),
        ]
        with (folder / f"{name}.log").open("w") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "megatron_sr1", *arguments],
                **{"cwd": ROOT, "stdout": log, "stderr": subprocess.STDOUT},
                start_new_session=True,
            )

    def finish(process, name):
        status = process.wait(timeout=SECONDS)
        assert status == 0, (folder / f"{name}.log").read_text()[-4000:]

    finish(start("whole", "whole"), "whole")
    killed, partial = start("killed", "killed"), folder / "killed/eval/held.jsonl.partial"
    deadline = time.monotonic() + SECONDS
    while len(read_lines(partial)) < 2 * CHUNK:
        assert killed.poll() is None and time.monotonic() < deadline, "ended before it was killed"
        time.sleep(0.01)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    before = read_lines(partial)
    with partial.open("a") as file:  # as if the kill had come in the middle of a line
        file.write(json.dumps(before[-1])[:20])
    finish(start("continued", "killed"), "continued")
    return folder, before


@pytest.mark.slow
def test_a_killed_evaluation_goes_on_with_the_same_answers(runs):
    folder, before = runs
    assert 2 * CHUNK <= len(before) < 2 * NUM_QUESTIONS, "in the middle"
    for name in ("eval/held.jsonl", "eval/results.json", "summary.json"):
        assert (folder / "killed" / name).read_bytes() == (folder / "whole" / name).read_bytes()
    assert not list((folder / "killed" / "eval").glob("*.partial"))
    lines = read_lines(folder / "killed/eval/held.jsonl")
    assert lines[: len(before)] == before
    assert [(line["index"], line["sample"]) for line in lines] == [
        (index, sample) for index in range(NUM_QUESTIONS) for sample in (0, 1)
    ]


@pytest.mark.slow
def test_what_was_answered_before_the_kill_is_not_asked_again(runs):
    folder, before = runs
    said = re.findall(r"held: (\d+) of (\d+) questions", (folder / "continued.log").read_text())
    first = len(before) // 2 + CHUNK
    assert (
        said[0] == (str(first), str(NUM_QUESTIONS))
        and len(said) == 1 + (NUM_QUESTIONS - first) // CHUNK
    )


@pytest.mark.slow
def test_a_line_has_the_prompt_as_the_model_reads_it(runs):
    line = read_lines(runs[0] / "whole/eval/held.jsonl")[0]
    question = line["question"].replace("<image>", "")
    assert line["prompt"].count("<|image_pad|>") == 1 and "<|im_start|>user" in line["prompt"]
    assert question in line["prompt"] and line["prompt"].endswith("<|im_start|>assistant\n")
    assert line["because"] in ("no box", "text", "quantity", "other text", "algebra", "option")


@pytest.mark.slow
def test_the_tables_are_printed_and_on_the_page(runs):
    log, page = ((runs[0] / name).read_text() for name in ("whole.log", "whole/report.html"))
    accuracy = json.loads((runs[0] / "whole/eval/results.json").read_text())["sets"]["held"][
        "rates"
    ]["accuracy"]
    rate, interval = "{:.1f} ({:.1f}–{:.1f})".format(*(100 * each for each in accuracy)).split()
    assert f"{rate}\n{interval}" in page and rate in log and interval in log
    assert "pass@2" in log and "description" in log and "…" not in log
