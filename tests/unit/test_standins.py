"""tools/standins.py: what docs/vision_sr1.md runs on has the published forms, and the judge's."""

import json

import pyarrow.parquet
import pytest

from megatron_sr1.demo.digits import make_digits
from megatron_sr1.evaluation.judge import strict_verdict, verdict_request
from tools.standins import BENCHMARKS, COLD_START, COMMIT, TRAINING, main, verdict


@pytest.fixture(scope="module")
def standins(tmp_path_factory):
    folder = tmp_path_factory.mktemp("standins")
    make_digits(folder / "digits", 1, num_train=3, num_eval=6, num_cold_start=30)
    assert main(["data", str(folder / "digits"), str(folder / "made")]) == 0
    return folder / "made"


def snapshot(standins, name):
    repository = standins / "huggingface" / "hub" / f"datasets--{name.replace('/', '--')}"
    assert (repository / "refs" / "main").read_text() == COMMIT
    return repository / "snapshots" / COMMIT


@pytest.mark.parametrize(
    ("name", "split"), [(TRAINING, "train"), *((n, "test") for n in BENCHMARKS)]
)
def test_questions_have_the_published_columns(standins, name, split):
    (path,) = (snapshot(standins, name) / "data").iterdir()
    assert path.name.startswith(f"{split}-")
    for row in pyarrow.parquet.read_table(path).to_pylist():
        assert row["problem"].count("<image>") == len(row["images"]) == 1
        assert row["answer"].isdecimal() and row["images"][0]["bytes"].startswith(b"\x89PNG")


def test_the_cold_start_has_three_files_of_two_forms(standins):
    folder = snapshot(standins, COLD_START)
    files = {path.name: json.loads(path.read_text()) for path in folder.glob("*.json")}
    assert sorted(map(len, files.values()))[0] > 0 and sum(map(len, files.values())) == 30
    for name, rows in files.items():
        for row in rows:
            if "caption" in name:
                assert row.keys() == {"instruction", "input", "output"}
            else:
                assert [turn["role"] for turn in row["messages"]] == ["user", "assistant"]
                assert (folder / row["images"][0]).is_file()


@pytest.mark.parametrize(("answer", "expected"), [("Cat", 1), (" kitten ", 1), ("dog", 0)])
def test_the_judge_understands_what_it_is_asked(answer, expected):
    line = {"question": "Which?", "gold": "cat", "other_golds": ["kitten"], "answer": answer}
    request = verdict_request({**line, "response": answer}, 0.0)
    messages = [{"role": role, "content": text} for role, text in request.messages]
    assert strict_verdict(verdict({"messages": messages})) == expected
