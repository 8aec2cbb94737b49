"""A judge in an evaluation from the command line: results, exit status, kills, the key."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_sr1.cli import main
from megatron_sr1.observability.metrics import read_lines
from tests.chat_endpoint import CLOSED, serving

KEY = "sk-a-key-of-this-test"
RIGHT, WRONG = '{"verdict": "right"}', '{"verdict": "wrong"}'
NUM_LINES, CONCURRENCY = 40, 4
JUDGE = (
    "model=m",
    "api_key_env=TEST_KEY",
    "timeout_seconds=20",
    "retries=1",
    "max_unjudged_share=0",
)
JUDGED_COLUMN = r"accuracy,.*\n.*\bjudged\b"
"""Its header in the terminal, on two lines."""
CHECKED = ("--from", "responses.jsonl", "evaluation.chunk_prompts=16", "output=run")


def arguments(url: str, *own: str) -> list[str]:
    settings = [f"evaluation.judge.{each}" for each in (f"base_url={url}", *JUDGE, *own)]
    return ["eval", "eval.yaml", *CHECKED, *settings]


@pytest.fixture(autouse=True)
def directory(tmp_path, monkeypatch):
    """One right and 39 wrong answers, in two sources."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TEST_KEY", KEY)
    monkeypatch.setattr("megatron_sr1.cli.configure_logging", lambda level: None)
    Path("eval.yaml").write_text("{}\n")
    with open("responses.jsonl", "w") as file:
        for n in range(NUM_LINES):
            line = {"prompt": "3 + 4?", "response": f"\\boxed{{{n}}}", "ground_truth": "7"}
            file.write(json.dumps({**line, "data_source": f"s{n % 2}"}) + "\n")


def by_parity(number, body) -> str:
    """Calls odd answers right."""
    answer = json.loads(body["messages"][1]["content"])["answer"]
    return RIGHT if int(answer) % 2 else WRONG


def test_the_final_verdict_has_its_rates_intervals_and_table(capsys):
    with serving(by_parity) as endpoint:
        assert main(arguments(endpoint.url, "when=always")) == 0
    lines = read_lines(Path("run/eval/responses.jsonl"))
    assert [line["judge"] for line in lines] == [n % 2 for n in range(NUM_LINES)]
    assert len(endpoint.bodies) == NUM_LINES == len(read_lines(Path("run/judge/verdicts.jsonl")))
    summary = json.loads(Path("run/summary.json").read_text())["responses"]
    assert (summary["accuracy"], summary["accuracy_judged"]) == (1 / 40, 0.5)
    assert (summary["judged"], summary["unjudged"]) == (40, 0)
    # observed 21/40, by chance 1/2: kappa (21/40 - 20/40) / (1 - 20/40)
    assert summary["judge_kappa"] == pytest.approx(0.05)
    found = json.loads(Path("run/eval/results.json").read_text())["sets"]["responses"]
    assert found["rates"]["accuracy_judged"] == pytest.approx([0.5, 0.352, 0.648], abs=1e-3)
    assert found["sources"]["s1"]["rates"]["accuracy_judged"][0] == 1
    printed, page = capsys.readouterr().out, Path("run/report.html").read_text()
    assert re.search(JUDGED_COLUMN, printed) and "accuracy, judged" in page
    for text in (printed, page):
        assert "50.0" in text and "(35.2–64.8)" in text
        assert "0.05" in text


@pytest.mark.parametrize("when", ["never", "rule_failed"])
def test_without_a_judge_nothing_is_asked_and_else_what_the_rules_call_wrong(when, capsys):
    with serving(by_parity) as endpoint:
        assert main(arguments(endpoint.url, f"when={when}")) == 0
    assert len(endpoint.bodies) == {"never": 0, "rule_failed": NUM_LINES - 1}[when]
    is_judged = when != "never"
    assert bool(re.search(JUDGED_COLUMN, capsys.readouterr().out)) == is_judged
    assert ("judge" in read_lines(Path("run/eval/responses.jsonl"))[0]) == is_judged


def test_too_many_unjudged_answers_are_the_exit_status_once_all_is_written():
    def failing(number, body):
        return 500 if json.loads(body["messages"][1]["content"])["answer"] == "8" else RIGHT

    with serving(failing) as endpoint:
        assert main(arguments(endpoint.url)) == 1
        lines = read_lines(Path("run/eval/responses.jsonl"))
        unjudged = [line for line in lines if line["unjudged"] is not None]
        assert [line["answer"] for line in unjudged] == ["8"]
        assert (unjudged[0]["judge"], unjudged[0]["accuracy_judged"]) == (None, 0)
        assert Path("run/report.html").exists() and Path("run/summary.json").exists()
        assert main(arguments(endpoint.url, "max_unjudged_share=0.5")) == 0
    with serving(by_parity) as endpoint:
        assert main(arguments(endpoint.url)) == 0
        assert len(endpoint.bodies) == 1, "the others are known"


def test_killed_in_the_middle_and_started_again_it_asks_nothing_twice():
    victims: list[subprocess.Popen] = []
    verdicts, half = Path("run/judge/verdicts.jsonl"), NUM_LINES // 2

    def script(number, body):
        if number != half:
            return RIGHT
        until = time.monotonic() + 30
        while len(read_lines(verdicts)) < half and time.monotonic() < until:
            time.sleep(0.01)  # those before are replied to
        os.kill(victims[0].pid, signal.SIGKILL)
        return CLOSED

    with serving(script) as endpoint:
        own = arguments(endpoint.url, "concurrency=1", "when=always")
        command = [sys.executable, "-m", "megatron_sr1", *own]
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
        victims.append(subprocess.Popen(command, env=environment))
        assert victims[0].wait() == -signal.SIGKILL
        assert not Path("run/eval/responses.jsonl").exists()
        assert main(own) == 0
    assert len(endpoint.bodies) == NUM_LINES + 1, "one had no reply yet"
    assert endpoint.bodies.pop(half) in endpoint.bodies
    assert len({json.dumps(body) for body in endpoint.bodies}) == NUM_LINES
    assert all(line["judge"] == 1 for line in read_lines(Path("run/eval/responses.jsonl")))


def test_the_key_is_in_no_file_and_no_log(capfd):
    with serving(lambda number, body: 401 if number else by_parity(number, body)) as endpoint:
        assert main(arguments(endpoint.url, "max_unjudged_share=1", "concurrency=1")) == 0
        command = [sys.executable, "-m", "megatron_sr1", *arguments(endpoint.url)]
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
        again = subprocess.run(
            [*command, "logging.level=debug"], env=environment, capture_output=True, text=True
        )
    assert again.returncode == 1 and set(endpoint.keys) == {f"Bearer {KEY}"}
    files = [path for path in Path("run").rglob("*") if path.is_file()]
    assert {"config.json", "responses.jsonl", "verdicts.jsonl"} <= {path.name for path in files}
    texts = {path.name: path.read_text() for path in files}
    texts |= {"log": again.stderr, "stdout": again.stdout, "own": "".join(capfd.readouterr())}
    assert "TEST_KEY" in texts["config.json"] and "HTTP 401" in texts["log"]
    assert [name for name, text in texts.items() if KEY in text] == []


def test_a_missing_key_stops_the_command_before_anything_is_graded(monkeypatch, capsys):
    monkeypatch.delenv("TEST_KEY")
    assert main(arguments("https://host.invalid/v1")) == 2
    error = capsys.readouterr().err
    assert "evaluation.judge.api_key_env=TEST_KEY" in error and "not set" in error
    assert not Path("run/eval/responses.jsonl").exists()
    assert main(["train", "eval.yaml", "stage=eval", *arguments("https://h.invalid/v1")[4:]]) == 2
