"""Answers from public bug reports, judged by tools/grade.py as a user runs it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.grading_field import CASES, DOMAIN
from tests.grading_raising import RAISING
from tools.grade import main

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.field


def line_of(case):
    gold, answer, question, _, _ = case
    return {"answer": answer, "gold": gold, "question": question}


@pytest.fixture(scope="module")
def graded(tmp_path_factory):
    """All cases in one file, graded by one run of the tool."""
    folder = tmp_path_factory.mktemp("grade")
    lines = [line_of(case) for case in CASES]
    (folder / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = [sys.executable, "tools/grade.py", folder / "in.jsonl", "--timeout", "60"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    out = [json.loads(line) for line in done.stdout.splitlines()]
    assert [{k: v for k, v in o.items() if k not in ("right", "because")} for o in out] == lines
    return {case[:3]: (o["right"], o["because"]) for case, o in zip(CASES, out, strict=True)}


def ids():
    return [f"{number}-{case[-1]}" for number, case in enumerate(CASES)]


@pytest.mark.parametrize("case", CASES, ids=ids())
def test_verdict(graded, case):
    right, because = graded[case[:3]]
    assert right is case[3], because
    assert because and not because.startswith("ungraded")


def test_the_deciding_rule_is_named(graded):
    by = {case[:3]: because for case in CASES for because in [graded[case[:3]][1]]}
    assert {"text", "option", "list", "algebra", "other text"} <= set(by.values())
    assert by["A", "5 \\neq x", DOMAIN] == "option"
    # The inputs known to raise elsewhere get a verdict from a rule.
    assert not [because for because in by.values() if because.startswith("uncomparable")]


def run(tmp_path, capsys, *lines, more=()):
    file = tmp_path / "in.jsonl"
    file.write_bytes(
        b"\n".join(x if isinstance(x, bytes) else json.dumps(x).encode() for x in lines)
    )
    status = main([str(file), *more])
    captured = capsys.readouterr()
    lines = [json.loads(line) for line in captured.out.splitlines()]
    return status, lines, captured.err


def test_both_responses_and_answers_are_accepted(tmp_path, capsys):
    status, out, _ = run(
        tmp_path,
        capsys,
        {"response": "so \\boxed{7}", "gold": "7"},
        {"response": "7", "gold": "7"},
        {"answer": " ", "gold": "7", "id": 3},
        {"answer": "9" * 9999, "gold": "7"},
    )
    assert status == 0 and out[2]["id"] == 3
    assert [(o["right"], o["because"]) for o in out] == [
        (True, "text"),
        (False, "no box"),
        (False, "no box"),
        (False, "too long"),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "line 2: no JSON"),
        (b"[" * 100_000, "line 2: no JSON"),
        ([1], "line 2: a list; expected"),
        ({"gold": "7"}, "line 2: neither of response and answer; expected"),
        ({"gold": "7", "answer": "7", "response": "7"}, "line 2: both of response and answer"),
        ({"answer": "7"}, "line 2: no gold; expected"),
        ({"answer": 7, "gold": "7"}, "line 2: answer is a int; expected"),
        ({"answer": "7", "gold": " "}, "line 2: the gold answer is ' '"),
    ],
)
def test_a_bad_line_is_named(tmp_path, capsys, line, message):
    status, _, err = run(tmp_path, capsys, {"answer": "7", "gold": "7"}, line)
    assert status == 2
    assert err.startswith("grade.py: error: ") and message in err and err.count("\n") == 1


def test_an_answer_that_raises_is_wrong_and_the_exception_is_named(tmp_path, capsys):
    lines = [{"answer": answer, "gold": gold} for gold, answer in RAISING]
    status, out, _ = run(tmp_path, capsys, *lines, more=("--timeout", "60"))
    assert status == 0 and not any(o["right"] for o in out)
    assert all(o["because"].startswith("uncomparable: ") for o in out), out


def test_a_missing_file_is_named(tmp_path, capsys):
    assert main([str(tmp_path / "absent.jsonl")]) == 2
    assert "absent.jsonl: No such file" in capsys.readouterr().err


def test_an_answer_that_exceeds_a_limit_or_raises_is_wrong_with_its_reason(tmp_path, capsys):
    status, out, _ = run(
        tmp_path,
        capsys,
        {"answer": "x \\neq 4", "gold": "x \\neq 5"},
        {"answer": "(x+y+z)^{99}", "gold": "x+1"},
        {"answer": "1/2", "gold": "\\frac{1}{2}"},
        # The library alone raises on the first, which the rules can judge.
        more=("--grader", "math_verify", "--timeout", "3"),
    )
    assert status == 0 and [o["right"] for o in out] == [False, False, True]
    assert out[0]["because"].startswith("uncomparable: KeyError: ")
    assert out[1]["because"].startswith("ungraded: comparing answer '(x+y+z)^{99}'")
    assert out[2]["because"] == "math_verify"


def test_help_shows_the_input_format():
    done = subprocess.run(
        [sys.executable, "tools/grade.py", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and '"gold": str' in done.stdout
