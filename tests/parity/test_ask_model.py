"""`ask` on the real engine: both passes of a question that no data set has.

The model is random, so a description here ends with a bracket that it happens to write; the real
tags belong to the demo's model, which tests/distributed/test_demo.py asks.
"""

import io
from pathlib import Path

import pytest
import rollout_setup as setup

from megatron_sr1.data.processor import Processor
from megatron_sr1.errors import DataError
from megatron_sr1.evaluation import ask
from megatron_sr1.evaluation.asked_model import ask_config
from megatron_sr1.show import answer_lines
from megatron_sr1.trainer.samples import Samples

LIMITS = ["data.min_pixels=784", "data.max_pixels=50176", "data.max_prompt_tokens=180"]
LENGTHS = ["rollout.max_response_tokens=40", "rollout.max_reading_tokens=8"]
SETTINGS = [*LIMITS, *LENGTHS, "rollout.max_model_len=256", "model.dtype=float32"]


def first_bracket(text):
    return text.partition(">")[0] or None if ">" in text else None


@pytest.fixture
def open_session(tiny_model, tmp_path, monkeypatch):
    """Start sessions over the engine that the other tests of rollouts share."""

    class Described(Samples):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.find_description = first_bracket

    monkeypatch.setattr(ask, "Samples", Described)

    def start(*overrides, number=1, temperature=None):
        directory = tmp_path / f"session_{len(list(tmp_path.iterdir()))}"
        directory.mkdir()
        settings = [*SETTINGS, "data.pass1_template=brief", "data.pass2_template=brief"]
        arguments = ([*settings, *overrides], directory, number, temperature)
        config = ask_config(str(tiny_model), *arguments)
        return ask.Session(config, setup.processor(tiny_model), setup.engine(tiny_model)[0])

    return start


def picture(number, size=(84, 28)):
    file = io.BytesIO()
    setup.image(number, size).save(file, "PNG")
    return file.getvalue()


def test_responses_have_the_pixels_and_the_seeds_of_an_evaluation(tiny_model, open_session):
    session = open_session(number=12, temperature=2.0)
    found = session.ask("Which digit is largest?", [picture(1)])
    assert len({each.response for each in found}) > 6
    read = [each for each in found if each.reading is not None]
    assert read and all(each.description for each in read)
    assert session.ask("Which digit is largest?", [picture(1)]) == found, "not reproducible"
    assert session.ask("Which digit is largest?", [picture(2)]) != found, "the image does nothing"


def test_a_recipe_without_descriptions_has_no_reading(open_session):
    session = open_session("reward.recipe=vision_r1", number=12, temperature=2.0)
    assert {each.reading for each in session.ask("What?", [picture(1)])} == {None}


def test_several_images_are_placed_at_their_marks_or_in_front(open_session, monkeypatch):
    prompts = []
    encode = Processor.encode_prompt

    def noted(self, example, vision, messages):
        prompts.append((example.question, vision.grids))
        return encode(self, example, vision, messages)

    monkeypatch.setattr(Processor, "encode_prompt", noted)
    images = [picture(1), picture(2, (56, 84))]
    session = open_session()
    session.ask("Same?", images)
    session.ask("Is <image> in <image>?", images)
    grids = ((1, 2, 6), (1, 6, 4))
    assert prompts == [("<image><image>Same?", grids), ("Is <image> in <image>?", grids)]


def test_a_question_that_cannot_be_asked_is_an_error_without_a_path(open_session):
    session = open_session()
    with pytest.raises(DataError, match="^prompt of .* tokens, at most 180"):
        session.ask("why " * 300, [picture(1)])
    with pytest.raises(DataError, match="^2 <image> marks in the text but 1 images"):
        session.ask("<image> or <image>?", [picture(1)])


def test_lines_of_standard_input_are_questions(open_session, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("One?\n\n" + "why " * 300 + "\nTwo?"))
    answer_lines(open_session(), (picture(1),))
    out, err = capsys.readouterr()
    assert [line for line in out.splitlines() if line.startswith("> ")][::2] == ["> One?", "> Two?"]
    assert out.count("reading") == 2
    (line,) = err.splitlines()
    assert line.startswith("megatron-sr1: error: prompt of")


def test_a_session_leaves_its_files_in_its_own_directory(open_session, tmp_path):
    before = set(Path.cwd().iterdir())
    open_session().ask("What?", [picture(1)])
    assert set(Path.cwd().iterdir()) == before
