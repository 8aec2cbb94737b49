"""Everything that is tied to the marks of a response's spans follows `reward.spans`."""

import json
import shutil

import pytest

from megatron_sr1.config.loading import load_config
from megatron_sr1.config.rollout import RewardConfig, SpansConfig
from megatron_sr1.data.examples import Record
from megatron_sr1.data.processor import Processor
from megatron_sr1.data.shards import write_shards
from megatron_sr1.demo.tiny_model import CHAT_TEMPLATE
from megatron_sr1.errors import ConfigError
from megatron_sr1.records import Completion, Message, Reading
from megatron_sr1.report.report import write_report
from megatron_sr1.rewards.leakage import states_answer
from megatron_sr1.rewards.response import find_answer, find_description, has_format, marks_of
from megatron_sr1.rewards.score import Scorer
from megatron_sr1.trainer.samples import Samples, description_tokens
from tests.rollout_case import case

SPANS = SpansConfig("see", "reason", "answer")
THINKING = SpansConfig(think_first=True)
OWN, FIRST = marks_of(SPANS), marks_of(THINKING)
WHOLE = "<see> 3 5 6 </see> <reason> 3 + 5 + 6 </reason> <answer> 14 </answer>"
SEEN = "<description> 3 5 6 </description> \\boxed{14}"
THOUGHT = f"3 + 5 <description> is 8, \\boxed{{8}}?\n</think>\n\n{SEEN}"
"""As a model goes on after a prompt that ends with `<think>`."""


def test_with_other_names_only_their_tags_count():
    assert find_description(WHOLE, OWN) == "3 5 6" and find_description(WHOLE) is None
    assert find_answer(WHOLE, OWN) == "14" and find_answer(WHOLE) is None
    assert has_format(WHOLE, "vision_sr1", OWN) and not has_format(WHOLE, "vision_sr1")
    published = "<description> 3 5 6 </description> <think> so </think> \\boxed{14}"
    assert has_format(published, "vision_sr1") and not has_format(published, "vision_sr1", OWN)
    assert find_description(published, OWN) is find_answer(published, OWN) is None


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<answer>1</answer> <answer> 2 </answer>", "2"),
        ("<answer>1</answer> <answer>2", None),
        ("<answer> </answer>", None),
        ("\\boxed{1}", None),
        ("<answer>\\boxed{1}</answer>", "\\boxed{1}"),
        ("<answer>1</answer", None),
    ],
)
def test_a_tagged_answer_is_the_last_one_if_it_is_closed(text, answer):
    assert find_answer(text, OWN) == answer


@pytest.mark.parametrize(
    "broken",
    [
        WHOLE + ".",
        "So: " + WHOLE,
        WHOLE.replace("</answer>", ""),
        WHOLE.replace(" 14 ", " "),
        WHOLE.replace("</see>", "</see> <see> </see>"),
        WHOLE + " <answer> 14 </answer>",
        WHOLE.replace("<answer> 14 </answer>", "\\boxed{14}"),
        WHOLE.replace("reason>", "think>"),
        "<answer> 14 </answer>",
    ],
)
def test_the_format_of_own_names_is_as_strict(broken):
    assert not has_format(broken, "vision_sr1", OWN)


def test_an_answer_before_the_description_leaves_none():
    assert find_description("<answer>1</answer> <see>3</see>", OWN) is None
    assert find_description("\\boxed{1} <see>3</see>", OWN) == "3"


@pytest.mark.parametrize("text", [THOUGHT, "<think> " + THOUGHT])
def test_thoughts_may_come_first_and_their_opening_mark_may_be_in_the_prompt(text):
    text = text.replace("<description> is", "it is")
    assert has_format(text, "vision_sr1", FIRST) and not has_format(text, "vision_sr1")
    assert find_description(text, FIRST) == "3 5 6" and find_description(text) in (None, "3 5 6")
    assert find_answer(text, FIRST) == "14"
    alone = text.replace("<description> 3 5 6 </description>", "")
    assert has_format(alone, "vision_r1", FIRST) and not has_format(alone, "vision_sr1", FIRST)


@pytest.mark.parametrize(
    "broken",
    [
        SEEN,
        "</think> " + SEEN,  # an empty thought
        "so </think> <think> so </think> " + SEEN,
        "so </think> so </think> " + SEEN,
        "Well: <think> so </think> " + SEEN,
        f"{SEEN} <think> so </think>",
        "so </think> \\boxed{14}",
        f"so </think> {SEEN} done",
    ],
)
def test_the_format_with_thoughts_first_is_as_strict(broken):
    assert not has_format(broken, "vision_sr1", FIRST)


def test_with_thoughts_first_a_description_is_one_that_follows_them():
    assert find_description(THOUGHT, FIRST) == "3 5 6"
    assert find_description("<description> 3 </description> so </think>", FIRST) is None
    assert find_description("so </think> \\boxed{1} " + SEEN, FIRST) is None
    assert find_description("so </think> so </think> " + SEEN, FIRST) is None


@pytest.mark.parametrize(("text", "marks"), [(WHOLE, OWN), (THOUGHT, FIRST)])
def test_the_description_of_a_growing_text_appears_once_with_its_closing_mark(text, marks):
    seen = [find_description(text[:end], marks) for end in range(len(text) + 1)]
    first = seen.index("3 5 6")
    assert set(seen[:first]) == {None} and set(seen[first:]) == {"3 5 6"}
    assert text[:first].endswith(marks.description[1])


def test_an_answers_mark_in_a_description_is_a_leak():
    assert states_answer("It shows <answer>9</answer>.", "14", "", OWN)
    assert not states_answer("It shows <verdict>9</verdict>.", "14", "", OWN)
    assert states_answer("\\boxed{9}", "14", "", OWN)


def test_the_span_that_is_credited_is_the_description_after_the_thoughts():
    pieces = ["a <description>", " b ", "</think>\n", "<description>", "x", "</", "description>"]
    assert description_tokens(pieces, FIRST) == (3, 7)
    assert description_tokens(["so", "<see>", "x", "</see><", "reason>"], OWN) == (1, 4)


def test_rewards_follow_the_names():
    read = Reading(
        (Completion((1,), (-0.5,), "<reason> 3+5+6 </reason> <answer>14</answer>", "stop"),)
    )
    taken = case(WHOLE, "14", "<image>What is the sum?", "3 5 6", read, True)
    with Scorer(RewardConfig(spans=SPANS)) as scorer:
        reward = scorer.score("s", *taken)
    assert (reward.accuracy, reward.format, reward.self_reward) == (1, 1, 1)
    assert (reward.answer, reward.reading_answer, reward.leak) == ("14", "14", False)
    with Scorer(RewardConfig()) as scorer:
        reward = scorer.score("s", *taken)
    assert (reward.accuracy, reward.format, reward.self_reward) == (0, 0, 0)


def test_the_built_in_prompts_that_ask_for_other_tags_are_refused_where_they_would_be_used():
    keys = ["model.path=x", "data.train=x", "reward.spans.answer=answer"]
    for key in ("data.pass1_template", "data.pass2_template"):
        others = {"data.pass1_template", "data.pass2_template"} - {key}
        with pytest.raises(ConfigError, match=f"^{key}=full asks for <description>"):
            load_config(None, [*keys, *(f"{other}=brief" for other in others)])
    load_config(None, [*keys, "data.pass1_template=brief", "reward.recipe=vision_r1"])


@pytest.fixture(scope="module")
def opening_model(tiny_model, tmp_path_factory):
    """A model whose chat template opens the thought, as Qwen3's."""
    folder = tmp_path_factory.mktemp("opening") / "model"
    shutil.copytree(tiny_model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    opening = CHAT_TEMPLATE.replace("assistant\n'", "assistant\n<think>\n'")
    (folder / "chat_template.jinja").write_text(opening)
    return folder


@pytest.mark.parametrize(
    ("spans", "opens", "lead", "closing"),
    [
        ({}, True, "\\boxed{", "}"),
        ({"answer": "answer"}, False, "<answer>", "</answer>"),
        ({"think_first": "true"}, True, "\n</think>\n\n\\boxed{", "}"),
        ({"think_first": "true"}, False, "<think>\n\n</think>\n\n\\boxed{", "}"),
    ],
)
def test_a_gold_answer_is_scored_after_the_marks_that_a_response_would_have(
    tiny_model, opening_model, tmp_path, spans, opens, lead, closing
):
    write_shards([Record((Message("user", "q"),), "\\boxed{14}")], tmp_path / "shards")
    keys = [f"reward.spans.{name}={value}" for name, value in spans.items()]
    keys += ["data.pass1_template=brief", "data.pass2_template=brief", "model.path=x"]
    config = load_config(None, [*keys, "data.train=x"])
    processor = Processor(opening_model if opens else tiny_model, 784, 200704)
    samples = Samples(config, str(tmp_path / "shards"), processor)
    before, answer = samples.gold_answer(samples.prompt(0))
    assert processor.tokenizer.decode(before) == lead
    assert processor.tokenizer.decode(answer) == f"14{closing}"


def test_a_runs_samples_find_its_descriptions(tiny_model, tmp_path):
    write_shards([Record((Message("user", "q"),), "1")], tmp_path / "shards")
    keys = ["reward.spans.description=see", "data.pass1_template=brief"]
    config = load_config(None, [*keys, "data.pass2_template=brief", "model.path=x"])
    samples = Samples(config, str(tmp_path / "shards"), Processor(tiny_model, 784, 200704))
    assert samples.find_description("<see> a cat </see> <think>") == "a cat"


@pytest.mark.parametrize("spans", [{"description": "see"}, None])
def test_the_gallery_shows_a_description_apart_from_the_rest(tmp_path, spans):
    name = "see" if spans else "description"
    response = f"<{name}> a cat </{name}> <think> purrs </think> \\boxed{{cat}}"
    line = {"index": 0, "question": "q", "gold": "cat", "response": response, "reading": None}
    line |= {"description": "a cat", "accuracy": 1, "self_reward": 1, "shortcut": 0}
    config = {"evaluation": {"sets": {"held": {"path": ""}}}, "reward": {"spans": spans or {}}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "held.jsonl").write_text(json.dumps(line) + "\n")
    page = write_report(tmp_path).read_text()
    assert "purrs" in page and f"&lt;{name}&gt;" not in page
