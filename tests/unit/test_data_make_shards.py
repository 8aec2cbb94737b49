"""tools/make_shards.py: every kind of source, bad samples named and counted."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from megatron_sr1.data.shards import ShardReader

TOOL = Path(__file__).resolve().parents[2] / "tools" / "make_shards.py"


def png(color="red"):
    buffer = io.BytesIO()
    Image.new("RGB", (9, 5), color).save(buffer, format="PNG")
    return buffer.getvalue()


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


def test_too_many_bad_samples_end_the_run_and_leave_nothing_usable(tmp_path):
    source = lines(tmp_path / "a.jsonl", {"problem": "good", "answer": "1"}, "{\n", "{\n")
    done = make(source, tmp_path / "out", "--max-skipped", 1, status=1)
    told = "make_shards: 2 of 3 rows (66.7%) cannot be used, --max-skipped is 1; correct"
    assert done.stderr.splitlines()[-1].startswith(told)
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
def test_a_source_that_cannot_be_read_is_one_line(tmp_path, name, content, message):
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
    assert "metadata.jsonl line 1, image 0: '../secret.png' leads out of" in done.stderr
