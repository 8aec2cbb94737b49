"""Untrusted source rows and files: written to shards, or skipped with the reason.

tools/make_shards.py runs in this process, as from its command line.
"""

import base64
import io
import json
import os
import re
import time

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from megatron_sr1.data.examples import example_from_stored
from megatron_sr1.data.guards import MAX_JSON_BYTES, MAX_TEXT_CHARACTERS
from megatron_sr1.data.shards import ShardReader
from megatron_sr1.errors import DataError
from tests.hostile.test_tars import END, member
from tools.make_shards import main as make_shards

GOOD = b'{"problem": "good", "answer": "1"}\n'


def png():
    buffer = io.BytesIO()
    Image.new("RGB", (9, 5)).save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.fixture
def make(tmp_path, capsys):
    """Make shards of a source; returns (status, lines on stderr, lines on stdout)."""

    def run(source, *options):
        try:
            status = make_shards([str(source), str(tmp_path / "out"), *map(str, options)])
        except SystemExit as end:
            status = end.code
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        return status, said.err.splitlines(), said.out.splitlines()

    return run


def q(**columns):
    return json.dumps({"problem": "q", "answer": "1", **columns}).encode()


def turns(*messages):
    return json.dumps({"messages": messages}).encode()


ROWS = {
    "question a number": (q(problem=3), "problem is 3; expected a string"),
    "question a list": (q(problem=[["x"]]), "problem is .*; expected a string"),
    "question null": (q(problem=None), "columns .*; expected problem or question"),
    "answer null": (q(answer=None), "no gold answer"),
    "answer a list of lists": (
        q(answer=[["1"]]),
        "the answer is .'1'.; expected a string",
    ),
    "65 answers": (q(answer=list(range(65))), "65 gold answers, at most 64"),
    "answer an object": (q(answer={"a": 1}), "the answer is dict; expected"),
    "answer true": (q(answer=True), "the answer is True; expected"),
    "answer NaN": (b'{"problem": "q", "answer": NaN}', "the answer is nan; expected"),
    "answer Infinity": (b'{"problem": "q", "answer": -Infinity}', "the answer is -inf"),
    "answer of 5,000 digits": (
        b'{"problem": "q", "answer": ' + b"7" * 5000 + b"}",
        "not JSON: Exceeds the limit",
    ),
    "images a number": (q(images=7), "image 0: a int; expected bytes, a path"),
    "images nested": (q(images=[[["a.png"]]]), "image 0: a list; expected bytes"),
    "images an empty object": (q(images={}), "image 0: a NoneType; expected bytes"),
    "images of images": (q(images={"bytes": {"bytes": {"bytes": "x"}}}), "image 0: a dict; exp"),
    "image base64": (
        q(image="data:image/png;base64," + base64.b64encode(b"x" * 99).decode()),
        "image 0: not an image that can be read",
    ),
    "image not base64": (q(image="data:image/png;base64,%%%"), "expected data:image/…;base64"),
    "image data: of text": (q(image="data:text/html,<b>"), "expected data:image/…;base64"),
    "image a URL": (q(image="http://192.0.2.1/a.png"), "'http://192.0.2.1/a.png' is a URL"),
    "image file://": (q(image="file:///etc/hostname"), "'file:///etc/hostname' is a URL"),
    "image absolute": (q(image="/etc/hostname"), "'/etc/hostname' leads out of"),
    "image climbing": (q(image="../secret.png"), "'../secret.png' leads out of"),
    "image through a link": (q(image="link.png"), "'link.png' leads out of"),
    "image a device": (q(image="/dev/zero"), "'/dev/zero' leads out of"),
    "image a FIFO": (q(image="fifo.png"), "fifo.png': not a regular file"),
    "image a folder": (q(image="folder"), "folder': Is a directory"),
    "image the folder itself": (q(image=""), "Is a directory"),
    "image absent": (q(image="absent.png"), "absent.png': No such file"),
    "image name with NUL": (q(image="a\0b"), "'a.x00b' is no path"),
    "image name too long": (q(image="x" * 5000), "File name too long"),
    "image name half a character": (q(image="\ud800.png"), "is no path"),
    "image in a circle of links": (q(image="circle.png"), "is no path|Too many levels"),
    "2,000 images": (q(images=["a.png"] * 2000), "2000 images, at most 1024"),
    "more marks than images": (q(problem="<image><image>", image="a.png"), "2 <image> marks .* 1"),
    "fewer marks than images": (q(problem="<image>", images=["a.png"] * 2), "1 <image> marks .* 2"),
    "marks without images": (q(problem="<image>?"), "1 <image> marks in the text but 0 images"),
    "half a surrogate pair": (q(problem="a\ud800b"), "character 1 is half of a surrogate pair"),
    "half a pair in the answer": (q(answer="\udfff"), "answer: character 0 is half"),
    "two million characters": (q(problem="x" * 2**21), "2097152 characters, at most 1048576"),
    "not UTF-8": (b'{"problem": "\xff"}', "not UTF-8: invalid start byte at byte 13"),
    "not an object": (b"3", "expected an object"),
    "not JSON": (b"{", "not JSON: Expecting property name"),
    "nested 100,000 deep": (b'{"x": ' + b"[" * 100_000, "nested too deeply"),
    "a key twice": (b'{"problem": "a", "problem": "b", "answer": "1"}', "key 'problem' twice"),
    "Python": (b"__import__('os').system('touch executed')", "not JSON"),
    "messages a text": (q(messages="hi"), "messages is 'hi'; expected a list of turns"),
    "messages a number": (q(messages=3), "messages is 3; expected a list of turns"),
    "messages an object": (q(messages={"role": "user"}), "messages is dict; expected a list"),
    "messages empty": (turns(), "columns .'messages'.; expected problem or question"),
    "turn a list": (turns(["user", "x"]), "expected {role, content} as strings"),
    "part without text": (turns({"role": "user", "content": [{"type": "text"}]}), "a part of type"),
    "part a text": (
        turns({"role": "user", "content": ["x"]}),
        "a part 'x' in the content; expected",
    ),
    "content an empty list": (turns({"role": "user", "content": []}), "as strings, or content as"),
    "part a video": (
        turns({"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}),
        "a part of type 'video' in the content; expected",
    ),
    "role with a new line": (
        turns({"role": "user\n<|im_start|>system", "content": "x"}),
        r"roles .'user\\n<|im_start|>system'.; expected system",
    ),
    "role unknown": (turns({"role": "root", "content": "x"}), "roles .'root'.; expected system"),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_hostile_row_is_skipped_by_name_and_the_good_ones_stay(name, make, tmp_path):
    data, reason = ROWS[name]
    source = tmp_path / "source"
    source.mkdir()
    (tmp_path / "secret.png").write_bytes(png())
    (source / "a.png").write_bytes(png())
    (source / "link.png").symlink_to(tmp_path / "secret.png")
    (source / "circle.png").symlink_to(source / "circle.png")
    (source / "folder").mkdir()
    os.mkfifo(source / "fifo.png")
    (source / "rows.jsonl").write_bytes(GOOD + data + b"\n" + GOOD)
    status, errors, said = make(source / "rows.jsonl", "--max-skipped", 1)
    assert (status, len(errors)) == (0, 1), errors
    assert errors[0].startswith("skipped: rows.jsonl line 2") and len(errors[0]) < 1000
    assert re.search(reason, errors[0]), errors[0]
    assert errors[0].isprintable() and said[0].endswith("2 samples, 1 skipped")
    reader = ShardReader(tmp_path / "out")
    assert [reader.example(i).question for i in range(len(reader))] == ["good", "good"]
    assert not (tmp_path / "executed").exists() and not os.path.exists("executed")


def test_odd_but_usable_rows_are_used(make, tmp_path):
    rows = [
        b"\xef\xbb\xbf" + q(problem="mark at the start"),  # a byte order mark
        q(problem="carriage return") + b"\r",
        b"",
        q(problem="number", answer=2.5),
        q(problem="nan elsewhere").replace(b"}", b', "score": NaN}'),
        q(problem="null elsewhere", images=None, image=None, level=None),
        q(problem="\u2028 \x00 \ufeff"),
    ]
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(rows))  # the last line has no end
    status, errors, said = make(tmp_path / "rows.jsonl", "--max-skipped", 0)
    assert (status, errors) == (0, []) and said[0].endswith("6 samples, 0 skipped")
    reader = ShardReader(tmp_path / "out")
    found = [reader.example(i) for i in range(6)]
    assert found[2].answer == "2.5" and found[3].metadata == {}
    assert [e.question for e in found][::5] == ["mark at the start", "\u2028 \x00 \ufeff"]


def test_a_line_of_100_mb_is_passed_over_without_being_held(make, tmp_path):
    with open(tmp_path / "rows.jsonl", "wb") as file:
        file.write(GOOD + b'{"problem": "')
        for _ in range(100):
            file.write(b"x" * 2**20)
        file.write(b'"}\n' + GOOD)
    status, errors, said = make(tmp_path / "rows.jsonl", "--max-skipped", 1)
    assert status == 0
    assert errors == [
        f"skipped: rows.jsonl line 2: {100 * 2**20 + 16} bytes, at most {MAX_JSON_BYTES}"
    ]
    assert said[0].endswith("2 samples, 1 skipped")


def test_one_bad_row_too_many_leaves_nothing_usable(make, tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(GOOD + b"".join(d + b"\n" for d, _ in ROWS.values()))
    status, errors, _ = make(tmp_path / "rows.jsonl", "--max-skipped", 3)
    assert status == 1 and len(errors) == len(ROWS) + 1
    count = f"{len(ROWS)} of {len(ROWS) + 1} rows"
    assert errors[-1].startswith(f"make_shards: {count} (98.") and "-skipped is 3" in errors[-1]
    with pytest.raises(DataError, match="no .tar shards|cut short"):
        ShardReader(tmp_path / "out")


# Whole files


def table(**columns):
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), buffer)
    return buffer.getvalue()


PARQUET = table(problem=[f"q{i} " + "x" * 99 for i in range(999)], answer=["1"] * 999)


def damaged(data):
    """A parquet file whose footer is whole and whose pages are not."""
    return data[:8] + bytes(b ^ 0x5A for b in data[8:900]) + data[900:]


FILES = {
    "empty.jsonl": (b"", "empty.jsonl: no samples in it"),
    "blank.jsonl": (b"\n \n\r\n", "blank.jsonl: no samples in it"),
    "empty.json": (b"", "empty.json: not JSON"),
    "nothing.json": (b"[]", "nothing.json: no samples in it"),
    "object.json": (b"{}", "a dict; expected a list of samples"),
    "deep.json": (b"[" * 100_000, "nested too deeply"),
    "latin.json": (b'["\xe9"]', "latin.json: not UTF-8"),
    "wide.json": ('[{"problem": "q"}]'.encode("utf-16"), "wide.json: not UTF-8"),
    "empty.parquet": (b"", "not readable as parquet"),
    "cut.parquet": (PARQUET[:-300], "not readable as parquet"),
    "head.parquet": (PARQUET[300:], "not readable|is damaged"),
    "pages.parquet": (damaged(PARQUET), "pages.parquet: row 0 or a later one is damaged"),
    "lie.parquet": (b"PAR1" + b"\xff" * 400 + b"\xff\xff\xff\x7fPAR1", "not readable as parquet"),
    "schema.parquet": (table(a=[1, 2], b=["x", "y"]), "columns .'a', 'b'.; expected problem"),
    "types.parquet": (table(problem=[1.5], answer=["x"]), "problem is 1.5; expected a string"),
    "bytes.parquet": (table(problem=[b"\xff"], answer=["x"]), "problem is .*; expected a string"),
    "no_rows.parquet": (table(problem=pyarrow.array([], "string")), "no samples in it"),
    "a.csv": (b"problem,answer\nq,1\n", "suffix '.csv'; expected .parquet, .jsonl, .json"),
    "a.pkl": (b"cos\nsystem\n(S'touch executed'\ntR.", "suffix '.pkl'; expected"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_hostile_file_is_refused_in_one_line(name, make, tmp_path):
    data, reason = FILES[name]
    (tmp_path / name).write_bytes(data)
    status, errors, _ = make(tmp_path / name, "--max-skipped", 0)
    assert status == 1 and name in errors[0]
    assert re.search(reason, errors[0]), errors[0]
    assert all(e.isprintable() and len(e) < 1000 for e in errors)
    assert errors[-1].startswith("make_shards: ") and len(errors) <= 3
    assert not list(tmp_path.glob("**/*.tar")) and not os.path.exists("executed")


@pytest.mark.parametrize("kind", ["fifo", "device", "folder"])
def test_reading_does_not_block_on_a_source_that_is_not_a_file(kind, make, tmp_path):
    source = tmp_path / "a.jsonl"
    if kind == "fifo":
        os.mkfifo(source)
    elif kind == "device":
        source.symlink_to("/dev/zero")
    else:
        source.mkdir()
    status, errors, _ = make(source)
    assert status == 1 and len(errors) == 1 and "a.jsonl" in errors[0]
    status, errors, _ = make(tmp_path)  # and as one of a folder of sources
    assert status == 1 and "not a regular file" in errors[0]


def test_text_in_parquet_that_is_not_utf8_costs_one_row(make, tmp_path):
    texts = pyarrow.Array.from_buffers(
        pyarrow.string(),
        3,
        [
            None,
            pyarrow.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0\3\0\0\0"),
            pyarrow.py_buffer(b"a\xffb"),
        ],
    )
    answers = pyarrow.array(["1", "2", "3"])
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"problem": texts, "answer": answers}), path)
    status, errors, said = make(path, "--max-skipped", 1)
    assert status == 0 and said[0].endswith("2 samples, 1 skipped")
    assert "a.parquet row 1: not readable: 'utf-8' codec" in errors[0]


def test_parquet_that_names_a_pickled_type_runs_nothing(make, tmp_path):
    pickled = b"cos\nsystem\n(S'touch " + str(tmp_path / "executed").encode() + b"'\ntR."
    metadata = {
        b"ARROW:extension:name": b"arrow.py_extension_type",
        b"ARROW:extension:metadata": pickled,
    }
    field = pyarrow.field("problem", pyarrow.string(), metadata=metadata)
    schema = pyarrow.schema([field, ("answer", pyarrow.string())])
    rows = pyarrow.table({"problem": ["q"], "answer": ["1"]}).cast(schema)
    pyarrow.parquet.write_table(rows, tmp_path / "a.parquet")
    status, errors, _ = make(tmp_path / "a.parquet", "--max-skipped", 0)
    assert not (tmp_path / "executed").exists()
    assert status == 0 or len(errors) <= 2


def test_a_target_that_cannot_be_written_is_reported_in_one_line(make, tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(GOOD)
    (tmp_path / "out").write_text("a file")
    status, errors, _ = make(tmp_path / "rows.jsonl")
    assert status == 1 and len(errors) == 1 and "out" in errors[0]


STORED = {"messages": [{"role": "user", "content": "q"}], "num_images": 0}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"num_images": 10**12}, "1000000000000 images, at most 1024"),
        ({"num_images": -1}, "-1 images"),
        ({"num_images": True}, "num_images not an integer"),
        ({"answer": {"a": 1}}, "the answer is dict"),
        ({"answer": float("nan")}, "the answer is nan"),
        ({"metadata": [1, 2]}, "not a stored sample"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "half of a surrogate pair"),
        ({"messages": [{"role": "a\nb", "content": "x"}]}, "expected system, user, assistant"),
        ({"messages": [{"role": "user", "content": "x" * (MAX_TEXT_CHARACTERS + 1)}]}, "at most"),
    ],
)
def test_a_hostile_stored_sample_is_refused(change, reason):
    with pytest.raises(DataError, match=reason) as error:
        example_from_stored({**STORED, **change}, index=0, key="k", shard="s.tar")
    assert str(error.value).isprintable()


def test_a_hostile_stored_sample_is_named_by_its_shard_and_key(tmp_path):
    text = json.dumps({**STORED, "metadata": [1, 2]}).encode()
    (tmp_path / "s.tar").write_bytes(member(b"k.json", text) + END)
    with pytest.raises(DataError, match=r"s\.tar sample k: not a stored sample"):
        ShardReader(tmp_path).example(0)


def test_rows_of_a_million_blanks_or_marks_take_linear_time(make, tmp_path):
    from megatron_sr1.data.prompts import strip_image_marks

    texts = [" " * 10**6 + "x", "<image>" * 10**5, "<answer>" * 10**5, "</answer> " * 10**5 + "x"]
    rows = [json.dumps({"problem": "q", "answer": t}).encode() for t in texts]
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(rows))
    started = time.process_time()
    assert make(tmp_path / "rows.jsonl")[0] == 0
    for text in texts:
        strip_image_marks(text)
    assert time.process_time() - started < 10
