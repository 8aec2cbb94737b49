"""Prompts: images replace their marks in pass 1, pass 2 is text only."""

import pytest

from megatron_sr1.config.loading import load_config
from megatron_sr1.data.prompts import (
    PASS1_INSTRUCTIONS,
    chat_messages,
    flat_text,
    pass1_messages,
    pass2_messages,
    strip_image_marks,
)
from megatron_sr1.demo.digits import PASS2_ORDER, STYLE
from megatron_sr1.errors import DataError
from megatron_sr1.records import Example, Message


def example(*turns, num_images=1):
    return Example(0, "k", "s.tar", tuple(Message(*t) for t in turns), "1", num_images)


@pytest.mark.parametrize("style", ["full", "brief"])
@pytest.mark.parametrize("recipe", ["vision_sr1", "see_think", "vision_r1"])
def test_images_replace_their_marks(style, recipe):
    asked = example(("system", "s"), ("user", "Is <image> like <image>?"), num_images=2)
    system, user = pass1_messages(asked, recipe, style)
    assert system == {"role": "system", "content": [{"type": "text", "text": "s"}]}
    kinds = [part["type"] for part in user["content"]]
    assert kinds == ["text", "image", "text", "image", "text"]
    assert flat_text(user).startswith("Is <image> like <image>?\n")
    assert flat_text(user).endswith(PASS1_INSTRUCTIONS[style][recipe])


def test_only_the_recipes_with_a_description_ask_for_one():
    for style, word in (("full", "<description>"), ("brief", "Describe")):
        asked = {r: word in PASS1_INSTRUCTIONS[style][r] for r in PASS1_INSTRUCTIONS[style]}
        assert asked == {"vision_sr1": True, "see_think": True, "vision_r1": False}
    for instruction in PASS1_INSTRUCTIONS["full"].values():
        assert "<think>" in instruction and "\\boxed{}" in instruction


def test_an_answer_after_the_question_is_not_shown():
    asked = example(("user", "<image>q"), ("assistant", "secret"))
    assert "secret" not in str(pass1_messages(asked, "vision_sr1"))
    late = example(("user", "q"), ("assistant", "see <image>"))
    with pytest.raises(DataError, match="0 <image> marks"):
        pass1_messages(late, "vision_sr1")


@pytest.mark.parametrize("order", ["question_first", "description_first"])
@pytest.mark.parametrize("style", ["full", "brief"])
def test_pass_2_is_text_only_in_the_configured_order_with_the_options(style, order):
    (message,) = pass2_messages("<image>\nWhich?\nA. cat\nB. dog", " a cat <image> ", style, order)
    (part,) = message["content"]
    assert part["type"] == "text"
    text = part["text"]
    question, description = text.index("Which?\nA. cat\nB. dog"), text.index("a cat <image>")
    assert (question < description) == (order == "question_first")
    assert text.count("<image>") == 1  # the description's own words, which stay text
    assert "answer" in text


@pytest.mark.parametrize("style", ["full", "brief"])
def test_with_the_question_first_only_the_end_depends_on_the_description(style):
    one, other = (
        pass2_messages("Which?", description, style)[0]["content"][0]["text"]
        for description in ("a cat", "two dogs")
    )
    assert one.removesuffix("a cat") == other.removesuffix("two dogs") != one


def test_the_digits_example_asks_in_pass_2_as_the_model_was_trained():
    config = load_config("examples/digits_cpu.yaml")
    assert (config.data.prompt_style, config.rollout.pass2_order) == (STYLE, PASS2_ORDER)


@pytest.mark.parametrize(
    ("question", "wanted"),
    [
        ("<image>What?", "What?"),
        ("<image>\n<image>\nWhat?\n    code", "What?\n    code"),
        ("Is <image> like <image> ?", "Is like ?"),
        ("What is it? <image>", "What is it?"),
        ("No picture\n\n\nhere", "No picture\n\n\nhere"),
    ],
)
def test_stripping_marks_leaves_the_rest_as_it_was(question, wanted):
    assert strip_image_marks(question) == wanted


def test_flat_text_is_the_inverse_of_chat_messages():
    for content in ("<image><image>a<image>", "plain", "<image>"):
        assert flat_text(chat_messages([Message("user", content)])[0]) == content
