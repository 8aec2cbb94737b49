"""`eval CONFIG --from FILE`: responses made elsewhere, graded without a model."""

import json
import subprocess
import sys

import pytest

from megatron_sr1.cli import main
from megatron_sr1.data.examples import Record
from megatron_sr1.data.shards import write_shards
from megatron_sr1.observability.metrics import read_lines
from megatron_sr1.records import RIGHT_FROM, Message
from tests.pictures import png

ASKED = "<image>How many?\nA. 3\nB. 4"
SEEN = "<description>four dots</description><think>x</think>\\boxed{B}"
LINES = [
    {"prompt": ASKED, "response": SEEN, "ground_truth": "B", "pass2": "\\boxed{4}"},
    {"prompt": ASKED, "response": SEEN, "ground_truth": "B", "reading": "\\boxed{3}"},
    {"prompt": ASKED, "response": "\\boxed{3}", "ground_truth": "B", "pass2": "\\boxed{4}"},
    {"prompt": "1/2 + 1/2", "response": "\\boxed{1}", "ground_truth": ["1", "1.0"], "score": 0},
]


@pytest.fixture
def grade(tmp_path, monkeypatch):
    """Grade files of these lines by name, with a configuration without a model."""
    monkeypatch.setattr("megatron_sr1.cli.configure_logging", lambda level: None)
    config = tmp_path / "eval.yaml"
    config.write_text(f"output: {tmp_path / 'run'}\n")

    def run(*overrides, **files):
        arguments = ["eval", str(config), *overrides]
        for name, lines in files.items():
            path = tmp_path / f"{name}.jsonl"
            texts = (line if isinstance(line, str) else json.dumps(line) for line in lines)
            path.write_text("".join(f"{text}\n" for text in texts))
            arguments += ["--from", str(path)]
        return main(arguments)

    return run


def verdicts(path):
    return [(line["accuracy"], line["self_reward"], line["shortcut"]) for line in read_lines(path)]


def test_upstreams_lines_become_an_evaluation_without_torch(tmp_path):
    (tmp_path / "eval.yaml").write_text(f"output: {tmp_path / 'run'}\n")
    (tmp_path / "mm-vet.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    program = (
        "import sys\nfrom megatron_sr1.cli import main\n"
        f"status = main(['eval', '{tmp_path}/eval.yaml', '--from', '{tmp_path}/mm-vet.jsonl'])\n"
        "sys.exit(status or 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "(30.1–95.4)" in done.stdout and "shortcut" in done.stdout
    run = tmp_path / "run"
    for named in ("eval/results.json", "report.html"):
        assert f": {run / named}" in done.stdout and (run / named).is_file()
    # The third has no description, so what its pass 2 read is not one of it.
    expected = [(1, 1, 0), (1, 0, 1), (0, 0, 0), (1, None, None)]
    assert verdicts(run / "eval/mm-vet.jsonl") == expected
    summary = json.loads((run / "summary.json").read_text())["mm-vet"]
    assert summary["accuracy"] == 0.75 and summary["questions"] == 4
    assert summary["self_reward"] == summary["shortcut_rate"] == pytest.approx(1 / 3)
    table = json.loads((run / "eval/results.json").read_text())["sets"]["mm-vet"]["table"]
    assert [*table.values()] == [1, 1, 0, 1]
    page = (run / "report.html").read_text()
    assert "75.0\n(30.1–95.4)" in page and "four dots" in page


def test_our_own_lines_are_graded_to_the_same_verdicts_again(grade, tmp_path, capsys):
    lines = [
        line | {"metadata": {"category": f"c{n % 2}"}, "source": "s"}
        for n, line in enumerate(LINES)
    ]
    assert grade(first=lines) == 0
    graded = read_lines(tmp_path / "run/eval/first.jsonl")
    assert grade(again=graded) == 0
    for one, other in zip(graded, read_lines(tmp_path / "run/eval/again.jsonl"), strict=True):
        assert other == one | {"metadata": other["metadata"]}
        assert one["metadata"].items() <= other["metadata"].items()
    assert "again by category" in capsys.readouterr().out


def test_several_responses_share_a_question_by_its_index(grade, tmp_path):
    lines = [LINES[3] | {"index": 5, "sample": s, "response": f"\\boxed{{{s}}}"} for s in range(3)]
    assert grade(sums=lines, more=LINES) == 0
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["sums"]["questions"] == 1 and summary["sums"]["accuracy"] == pytest.approx(1 / 3)
    assert (summary["sums"]["pass@3"], summary["sums"]["majority@3"]) == (1, 0)
    assert summary["average"]["accuracy"] == pytest.approx((1 / 3 + 3 / 4) / 2)


def test_a_set_has_its_own_function_and_weight(grade, tmp_path):
    (tmp_path / "mine.py").write_text("def half(**given):\n    return 0.5\n")
    own = [f"evaluation.sets.a.{key}" for key in ("path=none", "weight=3")]
    assert grade(*own, f"evaluation.sets.a.function={tmp_path}/mine.py:half", a=LINES, b=LINES) == 0
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["a"]["accuracy"] == RIGHT_FROM and summary["b"]["accuracy"] == 0.75
    assert summary["weighted_average"]["accuracy"] == pytest.approx((3 * 0.5 + 0.75) / 4)


def test_lines_without_gold_answers_take_them_from_the_shards_of_their_set(grade, tmp_path, caplog):
    """As Vision-SR1's precomputed responses are: dataset_index, prompt, response."""
    asked = [f"<image>Count picture {n}.\nA. {n}\nB. {n + 1}" for n in range(3)]
    records = [
        Record((Message("user", text),), "B", (png(),), {"category": f"c{n}"})
        for n, text in enumerate(asked)
    ]
    write_shards(records, tmp_path / "shards")
    lines = [
        {
            "dataset_index": n,
            "prompt": f"user\n{asked[n][7:]} Think.",
            "response": f"\\boxed{{{m}}}",
        }
        for n, m in ((2, 3), (0, 0), (1, 2))
    ]
    wrong = lines[0] | {"dataset_index": 1}
    beyond = lines[0] | {"dataset_index": 3}
    assert grade(f"evaluation.sets.a.path={tmp_path / 'shards'}", a=[*lines, wrong, beyond]) == 0
    said = caplog.text
    assert "a.jsonl line 4: the prompt does not ask what" in said and "sample 0" in said
    assert "a.jsonl line 5: dataset_index is 3" in said
    found = read_lines(tmp_path / "run/eval/a.jsonl")
    assert [(line["index"], line["accuracy"]) for line in found] == [(2, 1), (0, 0), (1, 1)]
    assert found[0]["metadata"] == {"category": "c2"} and found[0]["question"] == asked[2]


BAD = {
    '{"prompt": "q", "response": "r"': "not JSON",
    "[1]": "a list; expected",
    '{"prompt": "q", "response": "r"}': "no ground_truth; expected",
    '{"prompt": "q", "ground_truth": "1"}': "no response; expected",
    json.dumps(LINES[0] | {"response": 3}): "response is 3; expected a text",
    json.dumps(LINES[0] | {"ground_truth": {}}): "the answer is dict",
    json.dumps(LINES[0] | {"metadata": 3}): "metadata is 3; expected an object",
    json.dumps(LINES[0] | {"index": -1}): "index is -1; expected a whole number",
}


def test_bad_lines_are_counted_and_named_by_file_and_line(grade, tmp_path, capsys, caplog):
    assert grade(bad=[*BAD, "", LINES[0], LINES[1]]) == 0
    said = caplog.text
    for number, message in enumerate(BAD.values(), 1):
        assert f"bad.jsonl line {number}: {message}" in said
    found = json.loads((tmp_path / "run/summary.json").read_text())["bad"]
    assert (found["questions"], found["skipped"]) == (2, len(BAD))
    assert grade(f"data.max_skipped={len(BAD) - 1}", bad=[*BAD, LINES[0]]) == 2
    assert "8 lines skipped, at most 7 (data.max_skipped)" in capsys.readouterr().err


def test_unusable_files_are_named(grade, tmp_path, capsys):
    assert (
        grade(empty=[]) == 2 and "empty.jsonl: no line could be graded" in capsys.readouterr().err
    )
    config = str(tmp_path / "eval.yaml")
    missing = str(tmp_path / "none.jsonl")
    assert main(["eval", config, "--from", missing]) == 2
    assert f"{missing}: no such file" in capsys.readouterr().err
    assert main(["eval", config, "--from", missing, "--from", missing]) == 2
    assert "'none' is the name of 2 files" in capsys.readouterr().err
    assert main(["eval", config, "--from", missing, "--dry-run"]) == 2
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    assert grade(x=LINES) == 2 and "holds a training run" in capsys.readouterr().err
