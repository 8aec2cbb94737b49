"""`compare`: what differs between runs, with paired intervals, and what cannot be compared."""

import json
import math
import statistics
from pathlib import Path

import pytest

from megatron_sr1.cli import main
from megatron_sr1.data.examples import Record
from megatron_sr1.data.shards import write_shards
from megatron_sr1.records import Message
from megatron_sr1.report.compared import read_runs
from tests.pictures import png

HOSTILE = "<script>alert(1)</script>[red]"
RIGHT = {"old": [1, 1, 0, 0, 1, 0], "new": [1, 0, 1, 1, 1, 1]}
"""Accuracy of two runs on six questions."""


def answers(verdicts, question="<image>How many?", first=0):
    """Lines of an evaluation file; readings are right from the third question on."""
    for index, right in enumerate(verdicts, start=first):
        read = int(index >= 2)
        yield {
            "index": index,
            "sample": 0,
            "source": None,
            "prompt": "p",
            "question": f"{question} {index}",
            "gold": "3",
            "response": f"<description>{HOSTILE} {index}</description> \\boxed{{3}}",
            "description": f"{HOSTILE} {index}",
            "reading": "\\boxed{3}",
            "answer": "3",
            "accuracy": right,
            "self_reward": read,
            "description_exact": None,
            "shortcut": int(right > read),
        }


def write_lines(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_run(directory, verdicts=None, steps=4, sets=("held",), shards="gone", **settings):
    """A finished GRPO run whose last evaluation has these verdicts on each set."""
    directory.mkdir(parents=True)
    config = {
        "stage": "grpo",
        "output": "/elsewhere",
        "optimizer": {"num_steps": 4, "learning_rate": 1e-6},
        "evaluation": {"sets": {name: {"path": str(shards)} for name in sets}},
        **settings,
    }
    (directory / "config.json").write_text(json.dumps(config))
    curve = [
        {"step": n, "stage": "grpo", "reward/accuracy": 0.1 * n, "evaluation/held/accuracy": 0.2}
        for n in range(1, steps + 1)
    ]
    write_lines(directory / "metrics.jsonl", curve)
    for name in sets if verdicts is not None else ():
        write_lines(directory / f"eval/{name}.jsonl", answers(verdicts))
    return directory


@pytest.fixture
def runs(tmp_path) -> list[Path]:
    return [write_run(tmp_path / name, verdicts) for name, verdicts in RIGHT.items()]


def compare(capsys, *arguments) -> tuple[str, str]:
    """What the command prints, and the page that it names."""
    assert main(["compare", *map(str, arguments)]) == 0
    out = capsys.readouterr().out
    page = Path(out.rpartition("Page: ")[2].strip())
    return out, page.read_text()


def error(capsys, *arguments) -> str:
    assert main(["compare", *map(str, arguments)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def row(out, name):
    (line,) = [line for line in out.splitlines() if line.startswith(name)]
    return line


def test_the_difference_is_paired_and_has_its_interval(runs, capsys):
    gaps = [new - old for old, new in zip(*RIGHT.values(), strict=True)]
    half = 1.96 * statistics.stdev(gaps) / math.sqrt(6)
    shown = f"{100 * statistics.fmean(gaps):+.1f}\u00a0±\u00a0{100 * half:.1f}"
    assert shown == "+33.3\u00a0±\u00a065.3"
    out, page = compare(capsys, *runs)
    assert row(out, "new minus old").split()[3] == "6" and shown in row(out, "new minus old")
    assert f"<td>new minus old</td><td>6</td><td>{shown}</td>" in page
    assert "normal" in page, "which interval it is"
    assert "50.0\u00a0±\u00a040.0" in row(out, "old ")


def test_settings_that_differ_are_listed_and_no_others(tmp_path, capsys):
    settings = [{"seed": 1, "reward": {"recipe": "see_think"}}, {"seed": 1, "model": {"path": "m"}}]
    both = [write_run(tmp_path / str(n), [1, 0], **each) for n, each in enumerate(settings)]
    out, page = compare(capsys, *both)
    assert row(out, "reward.recipe").split() == ["reward.recipe", "see_think", "–"]
    assert row(out, "model.path").split() == ["model.path", "–", "m"]
    assert "seed" not in out and "learning_rate" not in out and "output" not in out
    assert "<td>reward.recipe</td><td>see_think</td><td>–</td>" in page


def test_curves_of_all_runs_share_their_axes(runs, capsys):
    (runs[1] / "metrics.jsonl").write_text(
        (runs[1] / "metrics.jsonl").read_text().replace('y": 0.2', 'y": 0.25').replace("0.4", "0.5")
    )
    out, page = compare(capsys, *runs)
    assert "Answer right" in page and "not drawn" not in page
    figure = page.partition("<b>Answer right</b>")[2].partition("</figure>")[0]
    assert '"name":"old"' in figure and '"name":"new"' in figure
    assert row(out, "answer right").split()[2:] == ["0.4", "0.5"]


def test_questions_on_which_the_verdicts_differ_are_shown_with_their_images(tmp_path, capsys):
    turn = Message("user", "<image>How many?")
    image = png((200, 30, 40), (28, 28))
    write_shards([Record((turn,), "3", (image,))] * 6, tmp_path / "started" / "shards")
    # The path is relative to where the run was started, as its `output` is.
    both = [
        write_run(tmp_path / f"started/runs/{name}", each, shards="shards", output=f"runs/{name}")
        for name, each in RIGHT.items()
    ]
    _, page = compare(capsys, *both)
    numbers = [int(part.partition(",")[0]) for part in page.split('class="note">no. ')[1:]]
    assert sorted(numbers) == [1, 2, 3, 5], "0 and 4 have the same verdicts"
    assert page.count('src="data:image/png;base64,') == 4
    assert page.count('data-run="old"') == page.count('data-run="new"') == 4


def test_model_text_and_names_are_escaped(tmp_path, capsys):
    both = [write_run(tmp_path / f"<b>{name}", each) for name, each in RIGHT.items()]
    out, page = compare(capsys, *both)
    assert "<script>alert" not in page and "&lt;script&gt;alert" in page
    assert "<b>old" not in page and "&lt;b&gt;old" in page
    assert "<b>new minus <b>old" in out


def test_the_demo_s_runs_are_compared_by_the_answers_in_its_directory(tmp_path, capsys):
    for name, verdicts in RIGHT.items():
        write_run(tmp_path / name, verdicts[:2], sets=("greedy", "sampled"))
        for way in ("greedy", "sampled"):
            write_lines(tmp_path / f"eval/{name}_{way}.jsonl", answers(verdicts))
    out, _ = compare(capsys, tmp_path / "old", tmp_path / "new")
    assert "Held out: greedy" in out and "Held out: sampled" in out and "Note" not in out
    rows = [line.split() for line in out.splitlines() if line.startswith("new minus old")]
    assert [cells[3] for cells in rows] == ["6", "6"], "the part that they answer in training"


def test_evaluations_without_training_are_compared(tmp_path, capsys):
    both = []
    for name, verdicts in RIGHT.items():
        both.append(tmp_path / name)
        write_lines(tmp_path / name / "eval/mmstar.jsonl", answers(verdicts))
        (tmp_path / name / "eval/results.json").write_text('{"sets": {"mmstar": {}}}')
    out, _ = compare(capsys, *both)
    assert "Held out: mmstar" in out and "Training" not in out and "Note" not in out


def test_of_three_runs_every_two_are_compared(runs, tmp_path, capsys):
    third = write_run(tmp_path / "third", [0, 0, 0, 1, 1, 1])
    out, _ = compare(capsys, *runs, third)
    for pair in ("new minus old", "third minus old", "third minus new"):
        row(out, pair)


def notes(*directories):
    return list(read_runs(directories).notes)


def test_other_questions_under_the_same_name_are_not_compared(runs, tmp_path, capsys):
    write_lines(runs[1] / "eval/held.jsonl", answers(RIGHT["new"], question="<image>Why?"))
    assert notes(*runs) == [
        "held-out set held: new was asked other questions; left out",
        "no held-out set was answered by two of them: there are no paired differences",
    ]
    out, _ = compare(capsys, *runs)
    assert "minus" not in out and "Note: held-out set held: new was asked other" in out


@pytest.mark.parametrize(("metadata", "same"), [({"id": 1}, True), ({}, True), ({"id": 2}, False)])
def test_the_same_words_about_another_image_are_another_question(runs, metadata, same):
    for run, own in zip(runs, ({"id": 1}, metadata), strict=True):
        lines = [line | {"metadata": own} for line in answers(RIGHT["new"])]
        write_lines(run / "eval/held.jsonl", lines)
    assert notes(*runs)[:1] == (
        [] if same else ["held-out set held: new was asked other questions; left out"]
    )


def test_fewer_questions_are_compared_where_both_answered(runs, capsys):
    write_lines(runs[1] / "eval/held.jsonl", answers([1, 0, 1]))
    (note,) = notes(*runs)
    assert "new answered 3 questions, the first run 6; differences are over the 3" in note
    out, _ = compare(capsys, *runs)
    assert row(out, "new minus old").split()[3] == "3"


def test_no_shared_question_or_set_is_said(runs, tmp_path):
    write_lines(runs[1] / "eval/held.jsonl", answers([1, 0], first=90))
    assert notes(*runs)[0] == "held-out set held: new shares no question; left out"
    other = write_run(tmp_path / "other", [1], sets=("mine",))
    found = notes(runs[0], other)
    assert "held-out set held: not answered by other" in found
    assert "held-out set mine: not answered by old" in found
    assert found[-1].startswith("no held-out set was answered by two")


def test_an_unfinished_run_is_compared_by_its_last_answers_and_said(tmp_path, capsys):
    whole = write_run(tmp_path / "whole", [1, 1, 0])
    stopped = write_run(tmp_path / "stopped", steps=2)
    for step, verdicts in ((1, [0, 0, 0]), (2, [1, 0, 0]), (10, [0, 0, 1])):
        write_lines(stopped / f"eval/held_step_{step}.jsonl", answers(verdicts))
    assert notes(whole, stopped) == [
        "stopped: unfinished, 2 of 4 steps",
        "stopped: its last answers to held are of step 10",
    ]
    out, _ = compare(capsys, whole, stopped)
    assert row(out, "stopped minus whole").split()[4].startswith("-33.3")


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["old", "gone"], "gone: no such directory; expected a directory with config.json"),
        (["old", "empty"], "empty: no run; expected a directory with config.json"),
        (["old", "model"], "model: no run"),
        (["old"], "two or more runs"),
        (["old", "new", "old"], "old: the same run twice"),
        (["old", "new/../old"], "the same run twice"),
    ],
)
def test_what_is_no_pair_of_runs_is_refused(runs, tmp_path, capsys, names, words):
    (tmp_path / "empty").mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text('{"model_type": "qwen2_5_vl"}')
    assert words in error(capsys, *(tmp_path / name for name in names))


def test_the_page_goes_where_it_is_wanted_or_into_the_first_run(runs, tmp_path, capsys):
    compare(capsys, *runs)
    assert (runs[0] / "compare.html").is_file() and (runs[0] / "plotly.min.js").is_file()
    compare(capsys, *runs, "--output", tmp_path / "deep/page.html", "--inline")
    assert (tmp_path / "deep/page.html").stat().st_size > 4e6
    assert not (tmp_path / "deep/plotly.min.js").exists()
    (tmp_path / "file").touch()
    line = error(capsys, *runs, "--output", tmp_path / "file/page.html")
    assert "cannot be written" in line and "--output" in line


def test_runs_of_the_same_name_are_told_apart(tmp_path, capsys):
    both = [write_run(tmp_path / name / "grpo", each) for name, each in RIGHT.items()]
    row(compare(capsys, *both)[0], "new/grpo minus old/grpo")
