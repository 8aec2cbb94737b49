"""Columns of common data sets: each is used, or the row is refused by name.

The rows are from public bug reports of trainers and data tools, with similar cases added.
"""

import base64
from types import SimpleNamespace as Of

import pytest

from megatron_sr1.config.rollout import RewardConfig
from megatron_sr1.config.training import DataConfig
from megatron_sr1.data.examples import (
    Record,
    count_marks,
    example_from_stored,
    stored,
)
from megatron_sr1.data.guards import located
from megatron_sr1.data.prompts import (
    Prompts,
    chat_messages,
)
from megatron_sr1.data.rows import record_from_row
from megatron_sr1.data.shards import ShardReader, write_shards
from megatron_sr1.errors import DataError
from megatron_sr1.records import Completion, Message, Reward, Rollout
from megatron_sr1.report.gallery import Question, gallery
from megatron_sr1.rewards.score import Scorer
from megatron_sr1.trainer.recording import rollout_line
from tests.pictures import png

pytestmark = pytest.mark.field


RED, BLUE = png("red"), png("blue")
DATA_URI = "data:image/png;base64," + base64.b64encode(RED).decode()


@pytest.fixture
def read(tmp_path):
    (tmp_path / "a.png").write_bytes(RED)
    (tmp_path / "b.png").write_bytes(BLUE)

    def read(row, **columns):
        columns = {name: path for name, path in columns.items()}
        with located("rows.json sample 3"):
            return record_from_row(row, tmp_path, columns)

    return read


def said(record):
    return [(m.role, m.content) for m in record.messages]


def golds(record):
    return (record.answer, *record.other_answers)


# Gold answers

GOLDS = {
    "<think>3+4</think>\n<answer> 7 </answer>": "7",
    "She sold 72. #### 72": "72",
    "She sold 72.\n#### 72\n": "72",
    "#### $\\frac{1}{2}$": "$\\frac{1}{2}$",
    "<Answer>7</Answer>": "7",
    "so <answer>7</answer>.": "7",
    "<answer>7</answer> or, again, <answer>7</answer>": "7",
    "<think>is it <answer>3</answer>?</think> 7": "7",
    "<think>3+4</think>7": "7",
    "<answer>3 + 4\n#### 7</answer>": "7",
    "Add them.\n#### 110\nThe answer is: 110": "110",
    "3 + 4 = 7. So the final answer is 7": "7",
    "Answer: blue": "blue",
    "a cat": "a cat",
    "So it is \\boxed{7}": "So it is \\boxed{7}",
    "#### Steps\nso \\boxed{7}": "#### Steps\nso \\boxed{7}",
    "the answer of a riddle": "the answer of a riddle",
    " 7 ": "7",
    7: "7",
}


@pytest.mark.parametrize("answer", GOLDS)
def test_a_gold_answer_is_extracted_from_its_solution(read, answer):
    for column in ("answer", "solution"):
        assert golds(read({"problem": "q", column: answer})) == (GOLDS[answer],)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("<answer>1</answer> or <answer>2</answer>", "tags in the gold answer that do not enclose"),
        ("<answer>1", "1 <answer> and </answer> tags"),
        ("1</answer>", "do not enclose one answer; write the answer alone there"),
        ("<answer></answer>", "is empty; write the answer alone there"),
        ("<think>3 + 4", "opens <think> and does not close it"),
        ("<think>3 + 4</think>", "is empty"),
        ("3 + 4 ####", "is empty"),
        ("#### Step 1\nadd", "#### in the gold answer, but not in its last line"),
        ("\\boxed{}", "is empty"),
        ("$ $", "is empty"),
        ([[1]], "expected a string or a number, or a list of them"),
        (True, "expected a string or a number"),
    ],
)
def test_a_gold_answer_that_nothing_can_match_is_refused(read, answer, reason):
    with pytest.raises(DataError, match=reason) as error:
        read({"problem": "q", "answer": answer})
    assert str(error.value).startswith("rows.json sample 3: ")


def test_an_empty_column_does_not_hide_a_filled_one(read):
    for empty in ("", "   ", None, [], [None], ["", " "]):
        assert read({"problem": "q", "answer": empty, "solution": "7"}).answer == "7"
        with pytest.raises(DataError, match="no gold answer; expected a column answer or solution"):
            read({"problem": "q", "answer": empty})
    record = read({"problem": "", "question": "real", "answer": "1"})
    assert said(record) == [("user", "real")] and record.metadata == {}
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    assert said(read({"messages": [], "conversations": turns}))[1] == ("assistant", "a")
    with pytest.raises(DataError, match="columns .'answer', 'problem'.; expected problem"):
        read({"problem": " \n", "answer": "1"})


def test_a_column_that_is_not_used_stays_in_the_metadata(read):
    record = read({"problem": "q", "question": "other", "answer": "7", "solution": "3 + 4"})
    assert record.answer == "7"
    assert record.metadata == {"question": "other", "solution": "3 + 4"}


def test_any_of_several_gold_answers_is_right_and_leaks(read, tmp_path):
    record = read({"problem": "What is it?", "answer": ["cat", "<answer>kitten</answer>", "cat"]})
    assert golds(record) == ("cat", "kitten")
    write_shards([record, read({"problem": "q", "answer": "1"})], tmp_path / "out")
    reader = ShardReader(tmp_path / "out")
    example = reader.example(0)
    assert example.golds == ("cat", "kitten") and reader.example(1).golds == ("1",)
    with Scorer(RewardConfig("see_think")) as scorer:

        def score(answer, description):
            text = f"<description>{description}</description><think>x</think>\\boxed{{{answer}}}"
            rollout = Rollout(0, 0, (), Completion((), (), text, "stop"), description, None, 0)
            return scorer.score("k", rollout, example)

        rewards = [score(answer, "fur") for answer in ("cat", "kitten", "dog")]
        assert [r.accuracy for r in rewards] == [1, 1, 0]
        leaks = [score("cat", f"The answer is {a}.").leak for a in ("cat", "kitten", "dog")]
        assert leaks == [True, True, False]


def test_saved_lines_name_further_gold_answers_only_if_there_are_any(read):
    rollout = Rollout(0, 0, (), Completion((), (), "x", "stop"), None, None, 0)
    scored = Of(rollout=rollout, reward=Reward(0, 0, None, False, 0, None, None))
    for answer, wanted in ((["1", "2"], ["2"]), ("1", None)):
        record = read({"problem": "q", "answer": answer})
        example = example_from_stored(stored(record), index=0, key="k", shard="s.tar")
        line = rollout_line(1, scored, example, {"advantage": 0.0})
        assert line["gold"] == "1" and line.get("other_golds") == wanted


def test_the_report_shows_all_gold_answers_and_marks_that_are_text():
    line = {"index": 0, "question": "<image>Is \\<image> a tag?", "gold": "<1>"}
    line |= {"other_golds": ["2"], "response": "x", "description": None, "reading": None}
    line |= {"accuracy": 1, "self_reward": None, "description_exact": None}
    card = gallery([Question("one", {"run": line})])
    assert "<dd>&lt;1&gt; or 2</dd>" in card
    assert "<dd>Is \\&lt;image&gt; a tag?</dd>" in card


def test_shards_of_earlier_versions_are_still_read():
    old = {
        "messages": [{"role": "user", "content": "<image>q"}],
        "answer": "<answer>7</answer>",
        "num_images": 1,
        "metadata": {"n": 1},
    }
    example = example_from_stored(old, index=0, key="k", shard="s.tar")
    assert example.golds == ("<answer>7</answer>",) and example.metadata == {"n": 1}
    assert stored(Record(example.messages, example.answer, (b"x",), {"n": 1})) == old
    empty = example_from_stored({**old, "answer": "  "}, index=0, key="k", shard="s.tar")
    assert empty.answer is None and empty.golds == ()


# Images


def test_an_empty_image_column_does_not_hide_a_filled_one(read):
    row = {"problem": "What colour?", "answer": "blue", "images": [], "image": "a.png"}
    record = read(row)
    assert record.images == (RED,) and said(record) == [("user", "<image>What colour?")]
    assert read({**row, "images": ["a.png"]}).images == (RED,)
    assert read({**row, "images": ["b.png"], "image": None}).images == (BLUE,)
    assert read({**row, "image": None}).images == ()
    with pytest.raises(
        DataError, match="sample 3: images in images and in image; keep only one of"
    ):
        read({**row, "images": ["b.png"]})
    for bad in ([None], "", {}):
        with pytest.raises(DataError, match="rows.json sample 3: image 0"):
            read({**row, "images": bad, "image": None})


@pytest.mark.parametrize("column", ["tools", "videos", "video", "audios", "audio"])
def test_a_column_that_training_does_not_support_is_refused_unless_empty(read, column):
    row = {"problem": "q", "answer": "1"}
    assert read({**row, column: []}).metadata == read({**row, column: ""}).metadata == {}
    with pytest.raises(DataError, match=f"the column {column} is not empty, but training"):
        read({**row, column: ["x"]})


# Turns


def test_history_and_system_of_alpaca_become_turns(read):
    row = {"instruction": "And now?", "input": "", "output": "5", "system": "Be brief"}
    record = read({**row, "history": [["What is 2+2?", "4"]]})
    asked = [("system", "Be brief"), ("user", "What is 2+2?"), ("assistant", "4")]
    assert said(record) == [*asked, ("user", "And now?"), ("assistant", "5")]
    assert record.metadata == {}
    for empty in ([], None, ""):
        assert said(read({**row, "history": empty, "system": ""})) == [
            ("user", "And now?"),
            ("assistant", "5"),
        ]
    for bad in ("x", [["a"]], [["a", 1]], {"a": 1}, [["a", "b", "c"]]):
        with pytest.raises(DataError, match="history is .*; expected"):
            read({**row, "history": bad})


def test_history_and_system_precede_the_question(read):
    row = {"problem": "<image>And now?", "answer": "5", "images": ["a.png"], "system": "Be brief"}
    record = read({**row, "history": [["q", "a"]]})
    assert [r for r, _ in said(record)] == ["system", "user", "assistant", "user"]
    assert record.answer == "5" and count_marks(record.messages) == 1


def test_the_system_column_of_sharegpt_is_used(read):
    turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]
    record = read({"conversations": turns, "system": "Be brief"})
    assert said(record) == [("system", "Be brief"), ("user", "hi"), ("assistant", "ho")]
    own = [{"from": "system", "value": "Be brief"}, *turns]
    assert said(read({"conversations": own, "system": "Be brief "})) == said(record)
    with pytest.raises(DataError, match="the column system and .* system turn differ"):
        read({"conversations": own, "system": "Be long"})
    with pytest.raises(DataError, match="both conversations and history; put all turns into"):
        read({"conversations": turns, "history": [["q", "a"]]})


def test_parts_of_openai_are_text_and_images(read):
    parts = [{"type": "image"}, {"type": "text", "text": "What is <image>?"}]
    record = read({"messages": [{"role": "user", "content": parts}], "answer": "1", "image": RED})
    assert said(record) == [("user", "<image>What is \\<image>?")] and record.images == (RED,)
    shown = [
        {"type": "image_url", "image_url": {"url": DATA_URI}},
        {"type": "text", "text": "or", "image": None},
        {"type": "image", "image": "b.png", "text": None},
        {"type": "input_image", "image_url": DATA_URI},
    ]
    turns = [
        {"role": "user", "content": shown},
        {"role": "assistant", "content": [{"type": "text", "text": "<image> two"}]},
    ]
    record = read({"messages": turns})
    assert record.images == (RED, BLUE, RED)
    assert said(record) == [("user", "<image>or<image><image>"), ("assistant", "<image> two")]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (
            [
                {"role": "assistant", "content": [{"type": "image"}]},
                {"role": "user", "content": "q"},
            ],
            "an image part in an assistant turn",
        ),
        (
            [{"role": "user", "content": [{"type": "audio"}]}],
            "a part of type 'audio' in the content",
        ),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": "https://x/y.png"}]}],
            "image 0: 'https://x/y.png' is a URL",
        ),
        (
            [{"role": "user", "content": [{"type": "image", "image": DATA_URI}]}],
            "images in images and in the turns themselves",
        ),
    ],
)
def test_parts_that_cannot_be_used_are_refused(read, row, reason):
    images = ["a.png"] if "in images" in reason else []
    with pytest.raises(DataError, match=reason) as error:
        read({"messages": row, "answer": "1", "images": images})
    assert str(error.value).startswith("rows.json sample 3")


def test_the_rows_of_verl_are_read(read):
    row = {
        "data_source": "geo3k",
        "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "<image>q"}],
        "images": [{"bytes": RED, "path": None}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "72"},
        "extra_info": {"answer": "She sold 72. #### 72", "index": 3},
    }
    record = read(row)
    assert said(record) == [("system", "s"), ("user", "<image>q")] and golds(record) == ("72",)
    assert record.metadata["data_source"] == "geo3k" and record.metadata["extra_info"]["index"] == 3
    assert golds(read({**row, "reward_model": {"ground_truth": ["72", "72.0"]}})) == ("72", "72.0")
    with pytest.raises(DataError, match="no gold answer"):
        read({**row, "reward_model": {"ground_truth": None}})
    assert said(read({"prompt": "q", "answer": "1"})) == [("user", "q")]
    with pytest.raises(DataError, match="prompt is 3; expected a list of turns"):
        read({"prompt": 3, "answer": "1"})


def test_a_dotted_path_reads_any_nested_value(read):
    row = {
        "prompt": [{"content": "<image>q", "role": "user"}],
        "info": {"gold": {"value": "<answer>7</answer>"}},
        "media": [{"path": "a.png"}],
        "answer": "a long text that nobody can match",
        "a.b": "dotted",
    }
    paths = {"problem": "prompt.0.content", "answer": "info.gold.value", "image": "media.0.path"}
    record = read(row, **paths)
    assert said(record) == [("user", "<image>q")] and golds(record) == ("7",)
    assert record.images == (RED,)
    assert record.metadata["a.b"] == "dotted" and "prompt" in record.metadata
    assert read({**row, "prompt": "x"}, problem="a.b", answer="info.gold.value").messages[0] == (
        Message("user", "dotted")
    )
    for path in ("prompt.1.content", "prompt.x", "absent", "prompt.0.content.deeper"):
        with pytest.raises(DataError, match=f"nothing at {path}, which is mapped to the column"):
            read(row, problem=path)
    assert read({**row, "media": [], "prompt": "q"}, **{**paths, "problem": "prompt"}).images == ()


def test_rows_with_nothing_to_learn_are_refused(read):
    with pytest.raises(DataError, match="no gold answer"):
        read({"messages": [{"role": "user", "content": "q"}]})
    with pytest.raises(DataError, match=r"turn 1 \(assistant\) is empty"):
        turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": " "}]
        read({"messages": turns})
    with pytest.raises(DataError, match=r"turn 0 \(user\) is empty"):
        turns = [{"role": "user", "content": ""}, {"role": "assistant", "content": "a"}]
        read({"messages": turns})
    assert read({"messages": turns, "image": RED}).messages[0].content == "<image>"


# The literal mark


def test_marks_in_an_assistant_turn_are_text(read):
    turns = [
        {"role": "user", "content": "<image>a"},
        {"role": "assistant", "content": "b <image> is here"},
    ]
    with pytest.raises(DataError, match=r"sample 3: 1 <image> marks .* 2 images; .*\\<image>"):
        read({"messages": turns, "images": ["a.png", "b.png"]})
    record = read({"messages": turns, "images": ["a.png"]})
    asked, answered = chat_messages(record.messages)
    assert [p["type"] for p in asked["content"]] == ["image", "text"]
    assert answered["content"] == [{"type": "text", "text": "b <image> is here"}]


def test_a_user_can_write_the_mark_as_text(read):
    text = "<image>Which HTML tag, <img> or \\<image>, is right?"
    record = read({"problem": text, "answer": "1", "images": ["a.png"]})
    with pytest.raises(DataError, match="2 <image> marks in the text but 1 images"):
        read({"problem": text.replace("\\", ""), "answer": "1", "images": ["a.png"]})
    example = example_from_stored(stored(record), index=0, key="k", shard="s.tar")
    prompts = Prompts(DataConfig(), "vision_r1")
    (message,) = prompts.pass1_messages(example)
    assert message["content"][0] == {"type": "image"}
    assert message["content"][1]["text"].startswith("Which HTML tag, <img> or <image>, is right?")
    (message,) = prompts.pass2_messages(example, "a page")
    assert "Which HTML tag, <img> or <image>, is right?" in message["content"][0]["text"]
