"""Prompts: templates render as configured, images replace their marks, pass 2 is text only."""

import json
from pathlib import Path

import pytest

from megatron_sr1.config.loading import load_config
from megatron_sr1.config.training import DataConfig
from megatron_sr1.data import sandbox
from megatron_sr1.data.prompts import Prompts, chat_messages, flat_text, strip_image_marks
from megatron_sr1.demo.digits import PROMPTS
from megatron_sr1.errors import ConfigError, DataError
from megatron_sr1.records import Example, Message
from megatron_sr1.rewards.answers import question_options

BEFORE = Path(__file__).parents[1] / "published" / "prompts_before.json"
QUESTION = "<image>Which?\nA. cat\nB. dog"
UPSTREAM = "{{ content | trim }} Say what you see in <see> </see>.\\n Then answer in \\boxed{}.\n"
"""In the form of EasyR1's and upstream's files, whose line breaks are two characters."""


def example(*turns, num_images=1, metadata=None):
    turns = tuple(Message(*turn) for turn in turns)
    return Example(0, "k", "s.tar", turns, "1", num_images, metadata or {})


def asked(content=QUESTION, num_images=1, **more):
    return example(("user", content), num_images=num_images, **more)


@pytest.fixture
def prompts(tmp_path):
    """Prompts with the texts of templates as files, and other keys of `data`."""

    def made(pass1=None, pass2=None, recipe="vision_sr1", **data):
        for name, text in (("pass1", pass1), ("pass2", pass2)):
            if text is not None:
                (tmp_path / f"{name}.jinja").write_text(text)
                data[f"{name}_template"] = str(tmp_path / f"{name}.jinja")
        return Prompts(DataConfig(**data), recipe, question_options)

    return made


def flat(messages):
    return [flat_text(message) for message in messages]


def test_the_built_in_prompts_are_word_for_word_those_that_models_were_trained_with():
    """As rendered before they were templates."""
    for case in json.loads(BEFORE.read_text()):
        data = DataConfig(**{f"pass{case['pass']}_template": case["template"]})
        prompts = Prompts(data, case["recipe"])
        sample = asked(case["question"], case["num_images"])
        if case["pass"] == 1:
            (message,) = prompts.pass1_messages(sample)
        else:
            (message,) = prompts.pass2_messages(sample, " a <image> and\n3 5 6. ")
        assert message == {"role": "user", "content": case["content"]}, case


def test_images_replace_their_marks():
    sample = example(("system", "s"), ("user", "Is <image> like <image>?"), num_images=2)
    system, user = Prompts(DataConfig(), "vision_sr1").pass1_messages(sample)
    assert system == {"role": "system", "content": [{"type": "text", "text": "s"}]}
    kinds = [part["type"] for part in user["content"]]
    assert kinds == ["text", "image", "text", "image", "text"]
    assert flat_text(user).startswith("Is <image> like <image>?\n")


def test_an_answer_after_the_question_is_not_shown():
    prompts = Prompts(DataConfig(), "vision_sr1")
    sample = example(("user", "<image>q"), ("assistant", "secret"))
    assert "secret" not in str(prompts.pass1_messages(sample))
    late = example(("user", "q"), ("assistant", "see <image>"))
    with pytest.raises(DataError, match="0 <image> marks"):
        prompts.pass1_messages(late)


@pytest.mark.parametrize("style", ["full", "brief"])
def test_with_the_question_first_only_the_end_depends_on_the_description(style):
    prompts = Prompts(DataConfig(pass2_template=style), "vision_sr1")
    one, other = (prompts.pass2_messages(asked(), d)[0]["content"] for d in ("a cat", "two dogs"))
    assert one[0]["text"].removesuffix("a cat") == other[0]["text"].removesuffix("two dogs")


def test_the_digits_example_asks_as_the_model_was_trained():
    data = load_config("examples/digits_cpu.yaml").data
    assert data.pass1_template == PROMPTS.pass1_template
    assert data.pass2_template == PROMPTS.pass2_template


def test_a_template_in_upstreams_form_puts_the_image_after_the_question(prompts):
    made = prompts(UPSTREAM, image_position="last")
    rest = " Say what you see in <see> </see>.\\n Then answer in \\boxed{}."
    for question in ("<image>Which?", "Which?<image>", "<image>\n Which? ", "\nWhich? <image>\n"):
        assert flat(made.pass1_messages(asked(question))) == ["Which?<image>" + rest]
    first = prompts(UPSTREAM, image_position="first")
    assert flat(first.pass1_messages(asked("Which?<image>"))) == ["<image>Which?" + rest]
    two = asked("Is <image> like <image>?", 2)  # the text refers to their places
    assert flat(made.pass1_messages(two)) == ["Is <image> like <image>?" + rest]
    assert flat(made.pass1_messages(asked("Why?", 0))) == ["Why?" + rest]


def test_a_template_has_question_description_options_images_metadata_and_recipe(prompts):
    names = (
        "{{ recipe }} {{ images }} {{ metadata.year }} {{ options['B'] }} {{ options | length }}"
    )
    made = prompts(
        f"{{{{ question }}}}: {names}", f"{names}: {{{{ content }}}}|{{{{description}}}}"
    )
    sample = asked(metadata={"year": 1907})
    assert flat(made.pass1_messages(sample)) == [f"{QUESTION}: vision_sr1 1 1907 dog 2"]
    (message,) = made.pass2_messages(sample, " a dog ")
    assert message["content"][0]["text"] == (
        "vision_sr1 1 1907 dog 2: Which?\nA. cat\nB. dog|a dog"
    )
    assert flat(prompts("{{ content }}{{ metadata.none }}").pass1_messages(sample)) == [QUESTION]
    shown = flat(prompts("{{ content }}{{ {'a': '<é>'} | tojson }}").pass1_messages(sample))
    assert shown == [QUESTION + '{"a": "<é>"}']


def test_neither_templates_nor_data_add_an_image(prompts):
    made = prompts(
        "<image> \\{{ question }} <image> {{ metadata.a }} {{ options.A }}",
        "{{ question }}{{ description }}",
    )
    sample = asked("<image>q\ue0da \\<image>\nA. <image\nB. x", metadata={"a": "<image>"})
    (message,) = made.pass1_messages(sample)
    kinds = [part["type"] for part in message["content"]]
    assert kinds == ["text", "image", "text"]
    assert message["content"][0]["text"] == "<image> \\"
    assert "q <image>\nA. <image\nB. x <image> <image>" in message["content"][2]["text"]
    (message,) = made.pass2_messages(sample, "<image>")
    assert [part["type"] for part in message["content"]] == ["text"]


def test_a_template_that_repeats_or_cuts_the_marks_is_reported_with_its_file(prompts):
    for text, number in (("{{ question }} {{ question }}", 2), ("{{ question[-1] }}", 0)):
        problem = rf"data.pass1_template=.*/pass1.jinja writes {number} image marks .* has 1"
        with pytest.raises(DataError, match=problem):
            prompts(text).pass1_messages(asked())


@pytest.mark.parametrize(
    ("pass1", "pass2", "said"),
    [
        ("Look!", None, "pass1.jinja does not write the question"),
        ("{% set question = 'x' %}{{ question }}", None, "does not write the question"),
        (None, "{{ description }}", "pass2.jinja does not write the question"),
        (None, "{{ question }}", "pass2.jinja does not write the description"),
        ("{{ question }}{{ description }}", None, "uses description; it has question, content"),
        ("{{ question }}{{ problem }}", None, "pass1.jinja uses problem; it has question"),
        ("{{ question }}\n\n{% if images %}", None, "pass1.jinja does not parse: line 3: "),
        ("{{ question | frobnicate }}", None, "does not parse: line 1: No filter named"),
        (None, "{{ question }}\n{{ description }", "pass2.jinja does not parse: line 2: "),
    ],
)
def test_a_template_that_cannot_be_used_is_refused_with_key_and_file(prompts, pass1, pass2, said):
    with pytest.raises(ConfigError) as error:
        prompts(pass1, pass2)
    assert said in str(error.value)
    assert str(error.value).startswith(f"data.pass{1 if pass1 else 2}_template=/")


@pytest.mark.parametrize("value", ["ful", "nowhere/x.jinja", "full_description_first", ""])
def test_an_unknown_template_is_refused_with_the_names_of_those_that_there_are(value):
    with pytest.raises(ConfigError, match=r"no such file; expected full \| brief, or a Jinja file"):
        Prompts(DataConfig(pass1_template=value), "vision_sr1")


HOSTILE = {
    "classes of a text": "{{ question.__class__.__mro__[1].__subclasses__() }}",
    "globals of a function": "{{ raise_exception.__globals__['os'] }}{{ question }}",
    "a file": "{% include '/etc/hostname' %}{{ question }}",
    "no end": f"{{{{ question }}}}{2 * '{% for a in range(99999) %}'}{2 * '{% endfor %}'}",
    "8 million characters": "{{ question }}{{ 'x' * images * 8388608 }}",
    "changing the metadata": "{{ question }}{{ metadata.clear() }}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_prompt_template_runs_in_the_sandbox_and_within_its_limits(name, prompts, monkeypatch):
    monkeypatch.setattr(sandbox, "TEMPLATE_SECONDS", 0.5)
    sample = asked(metadata={"a": 1})
    with pytest.raises(DataError, match="data.pass1_template=.*pass1.jinja (fails|writes)"):
        prompts(HOSTILE[name]).pass1_messages(sample)
    assert sample.metadata == {"a": 1}


def test_a_system_prompt_is_the_first_turn_of_both_passes_unless_a_sample_has_its_own(prompts):
    made = prompts(system_prompt="Say <image>.")
    system = {"role": "system", "content": [{"type": "text", "text": "Say <image>."}]}
    assert made.pass1_messages(asked())[0] == made.pass2_messages(asked(), "d")[0] == system
    own = made.pass1_messages(example(("system", "mine"), ("user", "<image>q")))
    assert [m["role"] for m in own] == ["system", "user"] and flat(own)[0] == "mine"
    assert [m["role"] for m in prompts().pass2_messages(asked(), "d")] == ["user"]


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
