"""The demo as a user runs it: GRPO teaches answers, the self-reward teaches descriptions.

Not covered: how long it takes, as that depends on the machine.
"""

import io
import itertools
import json
import re
import subprocess
import sys

import pytest
from rich.console import Console

from megatron_sr1.cli import main
from megatron_sr1.data.shards import ShardReader
from megatron_sr1.demo import demo
from megatron_sr1.demo.demo import WAYS, comparison
from megatron_sr1.errors import ConfigError
from megatron_sr1.observability.metrics import read_lines
from megatron_sr1.report.curves import FIGURES
from megatron_sr1.rewards.score import VERDICTS

PARTS = ("data", "cold start (600 steps)", "GRPO, answer only (40", "GRPO + self-reward (40")
MODELS = ("cold_start", "see_think", "vision_sr1")


@pytest.fixture(scope="module", params=(1, 2, 3), ids="seed{}".format)
def summary(demo_of, request):
    return json.loads((demo_of(request.param) / "summary.json").read_text())


@pytest.mark.slow
def test_self_reward_corrects_what_the_model_says_it_sees(summary):
    see_think, vision_sr1 = (summary[name]["sampled"] for name in MODELS[1:])
    assert vision_sr1["self_reward"] >= see_think["self_reward"] + 0.20
    assert vision_sr1["description_exact"] >= see_think["description_exact"] + 0.25
    assert vision_sr1["shortcut_rate"] <= see_think["shortcut_rate"] / 2


@pytest.mark.slow
def test_both_runs_answer_better_than_the_cold_start_when_sampled(summary):
    for name in MODELS[1:]:
        gain, _ = summary["differences"][f"{name} - cold_start"]["sampled"]["accuracy"]
        assert gain >= 0.03, name


@pytest.mark.slow
def test_greedy_answers_of_the_self_reward_run_do_not_suffer(summary):
    gain, half = summary["differences"]["vision_sr1 - cold_start"]["greedy"]["accuracy"]
    assert gain + half >= 0, "significantly below the cold start"
    assert summary["vision_sr1"]["greedy"]["accuracy"] >= 0.86


@pytest.mark.slow
def test_summary_is_computed_from_saved_verdicts_on_the_same_held_out_questions(demo):
    summary = json.loads((demo / "summary.json").read_text())
    asked = None
    for name in MODELS:
        for way in ("sampled", "greedy"):
            saved = read_lines(demo / "eval" / f"{name}_{way}.jsonl")
            questions = [(line["index"], line["question"], line["gold"]) for line in saved]
            assert len(questions) >= 2000
            assert asked in (None, questions)
            asked = questions
            right = sum(line["accuracy"] for line in saved) / len(saved)
            assert summary[name][way]["accuracy"] == pytest.approx(right)
            if name != "cold_start":
                gain, _ = summary["differences"][f"{name} - cold_start"][way]["accuracy"]
                before = summary["cold_start"][way]["accuracy"]
                assert gain == pytest.approx(right - before)
            shortcuts = [bool(line["accuracy"]) and not line["self_reward"] for line in saved]
            assert [bool(line["shortcut"]) for line in saved] == shortcuts


@pytest.mark.slow
def test_both_recipes_had_the_same_budget_and_left_what_a_run_leaves(demo):
    steps = {name: read_lines(demo / name / "metrics.jsonl") for name in MODELS[1:]}
    assert len(steps["see_think"]) == len(steps["vision_sr1"]) > 10
    for name in MODELS[1:]:
        assert [line["step"] for line in steps[name]] == list(range(len(steps[name])))
        asked = [line for line in steps[name] if "evaluation/sampled/shortcut_rate" in line]
        assert [line["step"] for line in asked] == [0, 10, 20, 30, 40]
        rolled = read_lines(demo / name / "rollouts" / "step_1.jsonl")
        assert len(rolled) == 256
        assert (demo / name / "hf" / "config.json").is_file()
    named = {metric for figure in FIGURES for metric in figure.metrics}
    assert named <= set(steps["vision_sr1"][-1]), "a figure for what no step writes"
    assert (demo / "report.html").stat().st_size > 10_000


@pytest.mark.slow
def test_a_log_names_the_four_parts_and_not_every_step(demo):
    text = (demo / "terminal.txt").read_text()
    parts = [text.index(f"{n}/4 {name}") for n, name in enumerate(PARTS, start=1)]
    assert parts == sorted(parts)
    logged = [line for line in text.splitlines() if " sft " in line]
    assert "sft 1/600" in logged[0] and "sft 600/600" in logged[-1] and len(logged) < 200
    assert text.index("Held-out questions") < text.index(str(demo / "report.html"))
    assert "megatron-sr1 train examples/digits_cpu.yaml" in text.splitlines()[-2]


@pytest.mark.slow
def test_its_two_runs_are_compared_with_intervals_and_images(demo, tmp_path, capsys):
    runs = (str(demo / name) for name in MODELS[1:])
    assert main(["compare", *runs, "--output", str(tmp_path / "compare.html")]) == 0
    lines = capsys.readouterr().out.splitlines()
    gaps = [line for line in lines if line.startswith("vision_sr1 minus see_think")]
    greedy, sampled = (re.findall(r"([+-]\d+\.\d)\u00a0±\u00a0(\d+\.\d)", each) for each in gaps)
    assert len(greedy) == len(sampled) == len(VERDICTS)
    (reading, half), (shortcut, _) = sampled[1], sampled[3]
    assert float(reading) - float(half) > 0 > float(shortcut)
    assert not [line for line in lines if line.startswith("Note")]
    assert (tmp_path / "compare.html").read_text().count("<img ") > 20


@pytest.mark.slow
def test_its_model_answers_questions_about_a_picture_from_a_file(demo, tmp_path):
    reader = ShardReader(str(demo / "data" / "eval"))
    reader.images(0)[0].save(tmp_path / "digits.png")
    digits = " ".join(map(str, reader.example(0).metadata["digits"]))
    command = [sys.executable, "-m", "megatron_sr1", "ask", str(demo / "vision_sr1")]
    questions = "What is the sum?\nWhich digit is largest?\n"
    done = subprocess.run(
        [*command, "--image", str(tmp_path / "digits.png"), "--n", "4"],
        input=questions,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    described = re.findall(r"^description +(\d \d \d) *$", done.stdout, re.MULTILINE)
    read = re.findall(r"^reading +(\d+) *$", done.stdout, re.MULTILINE)
    assert len(described) == len(read) == 8 and described.count(digits) >= 4
    assert [line for line in done.stdout.splitlines() if line[:2] == "> "] == [
        f"> {each}" for each in questions.splitlines()
    ]


def test_the_terminal_shows_every_rate_of_every_model():
    number = itertools.count(1)
    summary = {
        name: {way: {rate: next(number) / 1000 for rate, _ in VERDICTS.values()} for way in WAYS}
        for name in MODELS
    }
    shown = io.StringIO()
    Console(file=shown, width=80).print(comparison(summary))
    rows = [line.split("│")[1:-1] for line in shown.getvalue().splitlines() if "│" in line]
    assert len(rows) == len(WAYS) * (1 + len(VERDICTS))
    cells = [cell.strip() for row in rows for cell in row[1:]]
    assert sorted(filter(None, cells)) == sorted(f"{n / 10:.1f}" for n in range(1, next(number)))


def test_without_a_checkout_the_demo_says_what_is_missing_and_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "CONFIG", tmp_path / "examples" / "digits_cpu.yaml")
    with pytest.raises(
        ConfigError, match=r"examples/digits_cpu.yaml: no such file; .* `pip install"
    ):
        demo.prepare(tmp_path / "run", 1)
    assert not (tmp_path / "run").exists()
