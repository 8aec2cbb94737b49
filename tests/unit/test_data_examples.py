"""Source rows become records; rows that cannot be used are refused by name."""

import io

import pytest
from PIL import Image

from megatron_sr1.data import images as image_module
from megatron_sr1.data.examples import (
    ESCAPED_MARK,
    IMAGE_MARK,
    Record,
    count_marks,
    example_from_stored,
    place_marks,
    stored,
)
from megatron_sr1.data.guards import located
from megatron_sr1.data.images import decode_image
from megatron_sr1.data.prompts import chat_messages, flat_text, strip_image_marks
from megatron_sr1.data.rows import record_from_row
from megatron_sr1.errors import DataError
from megatron_sr1.records import Message


def png(size=(8, 8), color="red", mode="RGB", **options):
    buffer = io.BytesIO()
    Image.new(mode, size, color).save(buffer, format="PNG", **options)
    return buffer.getvalue()


def read(row, folder="."):
    from pathlib import Path

    with located("rows.jsonl line 3"):
        return record_from_row(row, Path(folder), columns={})


@pytest.mark.parametrize("text", ["problem", "question"])
@pytest.mark.parametrize("answer", ["answer", "solution"])
def test_reinforcement_rows_are_read_under_both_names(text, answer):
    record = read({text: "<image>How many?", answer: 4, "image": png(), "data_source": "charts"})
    assert record.messages == (Message("user", "<image>How many?"),)
    assert (record.answer, record.images) == ("4", (png(),))
    assert record.metadata == {"data_source": "charts"}


def test_an_image_is_taken_as_bytes_path_parquet_struct_or_list(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    for value in (png(), "a.png", {"bytes": png(), "path": None}, {"path": "a.png"}):
        for column, given in (("image", value), ("images", [value])):
            record = read({"problem": "?", "answer": "1", column: given}, tmp_path)
            assert record.messages[0].content == "<image>?"
            assert decode_image(record.images[0]).getpixel((0, 0)) == (255, 0, 0)


def test_sharegpt_rows_keep_their_turns_in_both_spellings():
    turns = [("user", "<image>a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    wanted = tuple(Message(*t) for t in turns)
    messages = [{"role": r, "content": c} for r, c in turns]
    assert read({"messages": messages, "images": [png()]}).messages == wanted
    other = [{"from": {"user": "human", "assistant": "gpt"}[r], "value": c} for r, c in turns]
    assert read({"conversations": other, "images": [png()]}).messages == wanted


def test_alpaca_rows_become_two_turns():
    record = read({"instruction": "Add.", "input": "1 and 2", "output": "3"})
    assert record.messages == (Message("user", "Add.\n\n1 and 2"), Message("assistant", "3"))
    assert read({"instruction": "Hi", "input": "", "output": "x"}).messages[0].content == "Hi"


def test_answer_tags_around_a_whole_solution_are_removed():
    assert read({"problem": "?", "solution": "<answer> 3 </answer>"}).answer == "3"
    assert read({"problem": "?", "solution": "see <answer>3</answer>!"}).answer == "3"


def test_marks_are_inserted_only_if_there_are_none():
    turns = [Message("system", "s"), Message("user", "q"), Message("assistant", "a")]
    placed = place_marks(turns, 2)
    assert [m.content for m in placed] == ["s", "<image><image>q", "a"]
    assert place_marks(placed, 2) == placed
    with pytest.raises(DataError, match="^2 <image> marks in the text but 1 images"):
        place_marks(placed, 1)
    with pytest.raises(DataError, match="2 <image> marks in the text but 0 images"):
        place_marks(placed, 0)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "hello"}, r"line 3: columns \['text'\]; expected problem or question"),
        ({"problem": "q"}, "line 3: no gold answer"),
        (
            {"problem": "q", "answer": "a", "images": ["absent.png"]},
            "image 0: 'absent.png': No",
        ),
        ({"problem": "q", "answer": "a", "image": 7}, "image 0: a int; expected bytes"),
        ({"problem": "q", "answer": "a", "image": b"GIF?"}, "image 0: not an image"),
        ({"problem": "q", "answer": "a", "image": png()[:-30]}, "image 0: the image does not"),
        ({"messages": [{"role": "user", "content": 3}]}, "expected {role, content}"),
        ({"messages": [{"role": "tool", "content": "x"}]}, r"roles \['tool'\]"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "at least one user turn"),
    ],
)
def test_a_row_that_cannot_be_used_is_named_with_the_reason(row, message):
    with pytest.raises(DataError, match=message) as raised:
        read(row)
    assert "rows.jsonl line 3" in str(raised.value)


def test_an_image_too_large_is_refused_before_it_is_decoded(monkeypatch):
    monkeypatch.setattr(image_module, "MAX_IMAGE_PIXELS", 99)

    def explode(self):
        raise AssertionError("decoded")

    data = png((10, 10))
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", explode)
    with pytest.raises(DataError, match="10 x 10 pixels, more than 99"):
        decode_image(data)


def test_a_decompression_bomb_is_refused():
    bomb = png((14000, 14000), 0, "1")
    assert len(bomb) < 200_000
    with pytest.raises(DataError, match="refused: .*pixels"):
        decode_image(bomb)


def test_an_image_too_long_for_the_model_is_refused():
    with pytest.raises(DataError, match="402 x 2 pixels.*200 times"):
        decode_image(png((402, 2)))
    decode_image(png((400, 2)))


def test_transparency_is_composited_over_white():
    assert decode_image(png(color=(0, 0, 0, 0), mode="RGBA")).getpixel((0, 0)) == (255,) * 3
    half = decode_image(png(color=(0, 0, 0, 128), mode="RGBA")).getpixel((0, 0))
    assert 120 < half[0] < 135


def test_a_picture_is_turned_upright():
    image = Image.new("RGB", (10, 4))
    exif = image.getexif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", exif=exif)
    assert decode_image(buffer.getvalue()).size == (4, 10)


def test_a_stored_record_comes_back_as_an_example():
    record = Record((Message("user", "<image>q"),), "a", (png(),), {"n": [1]})
    example = example_from_stored(stored(record), index=5, key="k", shard="s.tar")
    assert (example.index, example.key, example.shard, example.answer) == (5, "k", "s.tar", "a")
    assert (example.num_images, example.metadata, example.question) == (1, {"n": [1]}, "<image>q")
    for bad in ({}, {"messages": [], "num_images": "0"}, [], {"messages": 3, "num_images": 1}):
        with pytest.raises(DataError, match="not a stored sample"):
            example_from_stored(bad, index=0, key="k", shard="s.tar")


def test_columns_that_are_not_json_are_left_out_of_the_metadata():
    row = {"problem": "q", "answer": "a", "raw": b"\0", "level": 2, "nothing": None}
    assert read(row).metadata == {"level": 2}


@pytest.mark.field
@pytest.mark.parametrize(
    ("text", "texts"),
    [
        ("\\<image>", ["<image>"]),
        ("a\\\\<image>b", ["a\\\\", "b"]),  # LaTeX's line break, then an image
        ("\\\\\\<image>", ["\\\\<image>"]),
        ("<image>\\<image><image>", ["", "<image>", ""]),
        ("\\" * 10**6 + "<image>", ["\\" * 10**6, ""]),
    ],
)
def test_an_odd_number_of_backslashes_escapes_a_mark(text, texts):
    (message,) = chat_messages([Message("user", text)])
    wanted = [p for t in texts for p in ({"type": "image"}, {"type": "text", "text": t})][1:]
    assert message["content"] == [p for p in wanted if p.get("text") != ""]
    assert flat_text(message) == text
    assert count_marks([Message("assistant", text)]) == 0
    assert strip_image_marks(text) == " ".join(texts).strip()


@pytest.mark.field
def test_the_escaped_mark_is_a_backslash_and_the_mark():
    assert ESCAPED_MARK == "\\" + IMAGE_MARK == "\\<image>"
