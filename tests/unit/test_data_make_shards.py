"""tools/make_shards.py: every kind of source, bad samples named and counted."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from megatron_sr1.data.shards import ShardReader
from tests.pictures import png
from tools.make_shards import main, parse

TOOL = Path(__file__).resolve().parents[2] / "tools" / "make_shards.py"


def make(*arguments, status=0):
    done = subprocess.run(
        [sys.executable, str(TOOL), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done


def lines(path, *rows):
    path.write_text("".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in rows))
    return path


def questions(reader):
    return [reader.example(i).question for i in range(len(reader))]


def test_parquet_with_image_structs(tmp_path):
    rows = [
        {"problem": f"q{i}", "answer": str(i), "images": [{"bytes": png(), "path": None}] * (i % 3)}
        for i in range(7)
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    done = make(tmp_path / "a.parquet", tmp_path / "out", "--samples-per-shard", 3)
    assert done.stdout == f"{tmp_path / 'out'}: 7 samples, 0 skipped\n"
    reader = ShardReader(tmp_path / "out")
    assert questions(reader) == ["<image>" * (i % 3) + f"q{i}" for i in range(7)]
    assert reader.image_files(5) == [png(), png()]
    assert len(list((tmp_path / "out").glob("*.tar"))) == 3


def test_jsonl_with_image_paths_in_another_folder_and_a_limit(tmp_path):
    (tmp_path / "pics").mkdir()
    (tmp_path / "pics" / "a.png").write_bytes(png())
    rows = [{"question": f"<image>{i}", "solution": i, "image": "a.png"} for i in range(5)]
    source = lines(tmp_path / "a.jsonl", *rows)
    make(source, tmp_path / "out", "--image-folder", tmp_path / "pics", "--limit", 2)
    assert questions(ShardReader(tmp_path / "out")) == ["<image>0", "<image>1"]


@pytest.mark.parametrize(
    ("options", "gap"),
    [([], "\n\n"), (["--alpaca-gap", "blank-line"], "\n\n"), (["--alpaca-gap", "newline"], "\n")],
)
def test_alpaca_is_joined_by_a_blank_line_or_by_one_newline(tmp_path, options, gap):
    source = lines(tmp_path / "a.jsonl", {"instruction": "Add.", "input": "1, 2", "output": "3"})
    assert main([str(source), str(tmp_path / "out"), *options]) == 0
    assert questions(ShardReader(tmp_path / "out")) == [f"Add.{gap}1, 2"]


def test_sharegpt_json(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    turns = [{"role": "user", "content": "<image>q"}, {"role": "assistant", "content": "a"}]
    (tmp_path / "a.json").write_text(json.dumps([{"messages": turns, "images": ["a.png"]}]))
    make(tmp_path / "a.json", tmp_path / "out")
    assert [m.content for m in ShardReader(tmp_path / "out").example(0).messages] == [
        "<image>q",
        "a",
    ]


def test_an_image_folder(tmp_path):
    source = tmp_path / "folder"
    source.mkdir()
    (source / "a.png").write_bytes(png("blue"))
    (source / "b.png").write_bytes(png("green"))
    lines(
        source / "metadata.jsonl",
        {"file_name": "b.png", "problem": "one", "answer": "1"},
        {"file_names": ["a.png", "b.png"], "problem": "two", "answer": "2"},
    )
    make(source, tmp_path / "out")
    reader = ShardReader(tmp_path / "out")
    assert questions(reader) == ["<image>one", "<image><image>two"]
    assert reader.image_files(1) == [png("blue"), png("green")]


def test_bad_samples_are_named_skipped_and_counted(tmp_path):
    (tmp_path / "cut.png").write_bytes(png()[:-30])
    source = lines(
        tmp_path / "a.jsonl",
        {"problem": "good", "answer": "1"},
        "{broken\n",
        {"problem": "no answer"},
        {"problem": "q", "answer": "1", "image": "cut.png"},
        "[1]\n",
        {"problem": "also good", "answer": "2"},
    )
    done = make(source, tmp_path / "out", "--max-skipped", 4)
    assert done.stdout.splitlines()[0].endswith("2 samples, 4 skipped")
    for line, reason in ((2, "not JSON"), (3, "no gold"), (4, "does not decode"), (5, "object")):
        assert any(f"a.jsonl line {line}" in t and reason in t for t in done.stderr.splitlines())
    assert questions(ShardReader(tmp_path / "out")) == ["good", "also good"]


def test_too_many_bad_samples_fail_and_leave_nothing_usable(tmp_path):
    source = lines(tmp_path / "a.jsonl", {"problem": "good", "answer": "1"}, "{\n", "{\n")
    done = make(source, tmp_path / "out", "--max-skipped", 1, status=1)
    summary = "make_shards: 2 of 3 rows (66.7%) cannot be used, --max-skipped is 1; correct"
    assert done.stderr.splitlines()[-1].startswith(summary)
    with pytest.raises(Exception, match="cut short|no .tar shards"):
        ShardReader(tmp_path / "out")
    make(source, tmp_path / "out", "--max-skipped", 2)
    assert len(ShardReader(tmp_path / "out")) == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.parquet", None, "no such file"),
        ("a.csv", b"x", "suffix '.csv'; expected .parquet, .jsonl, .json"),
        ("a.parquet", b"PAR1 not", "not readable as parquet"),
        ("a.json", b"{}", "a dict; expected a list"),
        ("a.json", b"[", "not JSON"),
    ],
)
def test_a_source_that_cannot_be_read_is_reported_in_one_line(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    done = make(tmp_path / name, tmp_path / "out", status=1)
    (line,) = done.stderr.splitlines()
    assert line.startswith("make_shards: ") and name in line and message in line


def test_file_names_that_lead_out_of_the_image_folder_are_refused(tmp_path):
    source = tmp_path / "folder"
    source.mkdir()
    (tmp_path / "secret.png").write_bytes(png())
    lines(source / "metadata.jsonl", {"file_name": "../secret.png", "problem": "q", "answer": "1"})
    done = make(source, tmp_path / "out", "--max-skipped", 0, status=1)
    assert "metadata.jsonl line 1: image 0: '../secret.png' leads out of" in done.stderr


@pytest.mark.field
def test_all_rows_are_read_so_that_the_totals_are_known(tmp_path):
    """300 rows of which 150 name a missing file, as in the published cold-start set."""
    (tmp_path / "a.png").write_bytes(png())
    rows = [
        {"problem": f"q{i}", "answer": "1", "image": "a.png" if i % 2 else f"absent_{i}.png"}
        for i in range(300)
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    done = make(tmp_path / "rows.json", tmp_path / "out", status=1)
    assert done.stderr.splitlines()[-1] == (
        "make_shards: 150 of 300 rows (50.0%) cannot be used, --max-skipped is 100; correct the "
        "source, or raise it to 150 to leave them out"
    )
    assert 10 < len(done.stderr.splitlines()) < 20
    assert "     150  …: No such file or directory: first rows.json sample 0" in done.stdout
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    (kind,) = report.pop("kinds")
    assert report == {"rows": 300, "written": 0, "skipped": 150, "max_skipped": "100"}
    assert (kind["kind"], kind["count"]) == ("…: No such file or directory", 150)
    assert len(kind["examples"]) == 3 and "absent_4.png" in kind["examples"][2]
    with pytest.raises(Exception, match="cut short|no .tar shards"):
        ShardReader(tmp_path / "out")
    for bound, status in (("49.9%", 1), ("50%", 0)):
        make(tmp_path / "rows.json", tmp_path / "out", "--max-skipped", bound, status=status)
    assert len(ShardReader(tmp_path / "out")) == 150
    assert json.loads((tmp_path / "out" / "report.json").read_text())["written"] == 150


@pytest.mark.field
def test_kinds_of_faults_are_counted_apart(tmp_path):
    source = lines(
        tmp_path / "a.jsonl",
        *({"problem": "q", "answer": "1", "image": f"absent {i}.png"} for i in range(3)),
        *({"problem": "q", "answer": "1", "image": f"http://192.0.2.1/{i}.png"} for i in range(4)),
        *({"problem": f"q{i}"} for i in range(5)),
        *({"problem": i, "answer": "1"} for i in range(2)),
        {"problem": "good", "answer": "1"},
    )
    done = make(source, tmp_path / "out")
    found = [line.split(": first")[0].split(None, 1) for line in done.stdout.splitlines()[1:-1]]
    assert [count for count, _ in found] == ["5", "4", "3", "2"]
    kinds = ("no gold answer", "… is a URL", "…: No such file", "problem is …; expected a string")
    assert all(kind.startswith(start) for (_, kind), start in zip(found, kinds, strict=True))
    assert done.stdout.splitlines()[0].endswith("1 samples, 14 skipped")
    assert done.stdout.splitlines()[-1].endswith("report.json")


@pytest.mark.field
def test_columns_are_mapped_by_dotted_paths(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    row = {"prompt": [{"content": "<image>q"}], "gold": [1, 2], "media": {"file": "a.png"}}
    source = lines(tmp_path / "a.jsonl", row, {**row, "gold": 3})
    paths = ["--column", "problem=prompt.0.content", "--column", "answer=gold"]
    make(source, tmp_path / "out", *paths, "--column", "image=media.file")
    reader = ShardReader(tmp_path / "out")
    assert [reader.example(i).golds for i in range(2)] == [("1", "2"), ("3",)]
    assert reader.example(0).question == "<image>q" and reader.image_files(0) == [png()]
    lines(source, {**row, "prompt": [{"content": "q"}]})
    done = make(source, tmp_path / "other", *paths, "--column", "image=media.fiel", status=1)
    assert "no row has an image at media.fiel, where --column looks" in done.stderr
    with pytest.raises(Exception, match="cut short|no .tar shards"):
        ShardReader(tmp_path / "other")


@pytest.mark.field
@pytest.mark.parametrize(
    ("option", "value", "reason"),
    [
        ("--max-skipped", "101%", "expected a count or a share, as 100 or 5%"),
        ("--max-skipped", "-1", "expected a count or a share|expected one argument"),
        ("--max-skipped", "0.5", "expected a count or a share"),
        ("--column", "problem", "expected NAME=PATH"),
        ("--column", "probelm=prompt", "expected NAME=PATH, NAME one of answer, conversations"),
        ("--limit", "-1", "--limit 0 or more|expected one argument"),
    ],
)
def test_a_wrong_option_is_refused_with_the_valid_form(option, value, reason, capsys):
    with pytest.raises(SystemExit) as end:
        parse(["a", "b", option, value])
    assert end.value.code == 2
    assert re.search(reason, " ".join(capsys.readouterr().err.split()))


@pytest.mark.field
def test_help_explains_the_columns_and_the_limit(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    text = capsys.readouterr().out
    for what in ("reward_model", "history", "report.json", "exit status", "prompt.0.content", "5%"):
        assert what in text
    assert "rows\nwithout an image are fine" in text


@pytest.mark.field
def test_file_name_and_an_image_column_are_refused_together(tmp_path):
    source = tmp_path / "folder"
    source.mkdir()
    (source / "a.png").write_bytes(png())
    row = {"file_name": "a.png", "image": "b.png", "problem": "q", "answer": "1"}
    lines(source / "metadata.jsonl", row)
    done = make(source, tmp_path / "out", "--max-skipped", 0, status=1)
    assert "metadata.jsonl line 1: both file_name and an image column" in done.stderr
