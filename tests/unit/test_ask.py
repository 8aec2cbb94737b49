"""`ask` before an engine starts: which model and settings it takes, and what it refuses."""

import json
import os
from pathlib import Path
from unittest.mock import patch

import pytest
from PIL import Image

from megatron_sr1.cli import main
from megatron_sr1.errors import ConfigError, DataError
from megatron_sr1.evaluation.ask import Answered, answer_table, read_images
from megatron_sr1.evaluation.asked_model import ask_config, find_run

OF_RUN = {
    "stage": "grpo",
    "output": "elsewhere",
    "seed": 5,
    "model": {"path": "cold/hf", "dtype": "float32", "commit": "abc"},
    "parallel": {"tensor": 4},
    "data": {"train": "gone", "pass1_template": "brief", "max_prompt_tokens": 128},
    "rollout": {"tensor_parallel": 4, "max_response_tokens": 48, "pass2_mode": "likelihood"},
    "reward": {"recipe": "see_think"},
    "logging": {"a_key_of_an_older_version": 1},
}


@pytest.fixture
def run(tmp_path) -> Path:
    """A run with hf/, a checkpoint, and the configuration above."""
    run = tmp_path / "run"
    for folder in ("hf", "checkpoints/step_2/hf_files"):
        (run / folder).mkdir(parents=True)
        (run / folder / "config.json").write_text('{"model_type": "qwen2_5_vl"}')
    (run / "hf/model.safetensors").touch()
    (run / "checkpoints/step_2/.metadata").touch()
    (run / "checkpoints/step_2/state.json").write_text("{}")
    (run / "checkpoints/latest").write_text("step_2\n")
    (run / "config.json").write_text(json.dumps(OF_RUN))
    return run


@pytest.fixture
def session(tmp_path) -> Path:
    (tmp_path / "session").mkdir()
    return tmp_path / "session"


@pytest.mark.parametrize("inside", ["hf", "checkpoints", "checkpoints/step_2"])
def test_a_model_inside_a_run_has_the_runs_settings(run, inside):
    model = str(run / inside)
    assert find_run(model) == (model, run / "config.json")


def test_a_run_stands_for_its_exported_model_or_else_its_checkpoints(run):
    assert find_run(str(run)) == (str(run / "hf"), run / "config.json")
    (run / "hf").rename(run / "moved")
    assert find_run(str(run)) == (str(run / "checkpoints"), run / "config.json")


def test_other_models_belong_to_no_run(run, tmp_path):
    (run / "config.json").unlink()
    assert find_run(str(run / "hf")) == (str(run / "hf"), None)
    assert find_run("Qwen/Qwen2.5-VL-3B-Instruct") == ("Qwen/Qwen2.5-VL-3B-Instruct", None)


def test_a_directory_of_runs_names_their_models(run, tmp_path):
    (tmp_path / "config.json").write_text('{"stage": "grpo"}')
    with pytest.raises(ConfigError, match=f"name one of {run / 'hf'}"):
        find_run(str(tmp_path))


def test_the_runs_prompts_and_limits_are_used_but_not_its_layout(run, session):
    config = ask_config(str(run), [], session)
    assert config.model.path == str(run / "hf") and config.model.commit == ""
    assert (config.seed, config.data.pass1_template, config.reward.recipe) == (
        5,
        "brief",
        "see_think",
    )
    assert (config.data.train, config.rollout.max_response_tokens) == ("", 48)
    assert config.rollout.tensor_parallel == config.parallel.tensor == 1
    assert config.rollout.pass2_mode == "generate", "a likelihood needs a gold answer"
    assert (config.rollout.samples_per_prompt, config.rollout.temperature) == (1, 0)
    assert config.output == str(session), "nothing is written into the run"


def test_several_responses_are_sampled_and_overrides_come_last(run, session):
    config = ask_config(str(run), ["rollout.max_response_tokens=9"], session, 4)
    rollout = config.rollout
    assert (rollout.samples_per_prompt, rollout.temperature) == (4, 1.0)
    assert rollout.max_response_tokens == 9
    assert ask_config(str(run), [], session, 4, 0.3).rollout.temperature == 0.3


@pytest.mark.parametrize(
    ("overrides", "number", "temperature", "words"),
    [
        ([], 2, 0.0, "--n 2 at temperature 0"),
        ([], 0, None, "samples_per_prompt is 0; expected 1 or more"),
        ([], 1, -1.0, "evaluation.temperature is -1.0"),
        (["rollout.tensor_parallel=2"], 1, None, "one process"),
        (["parallel.pipeline=2"], 1, None, "one process"),
        (["rollout.max_tokens=3"], 1, None, "unknown key 'rollout.max_tokens'"),
    ],
)
def test_what_cannot_be_asked_is_refused(run, session, overrides, number, temperature, words):
    with pytest.raises(ConfigError, match=words):
        ask_config(str(run), overrides, session, number, temperature)


def test_a_setting_of_a_run_that_is_no_longer_one_is_named_with_its_file(run, session):
    (run / "config.json").write_text(json.dumps({**OF_RUN, "data": {"prompt_style": "brief"}}))
    with pytest.raises(ConfigError, match=rf"^{run / 'config.json'}: 'data.prompt_style' is no"):
        ask_config(str(run), [], session)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gone.png", "gone.png: No such file"),
        ("text.png", "text.png: not an image that can be read as"),
        ("half.png", "half.png: the image does not decode"),
        (".", "Is a directory"),
    ],
)
def test_an_image_that_cannot_be_read_is_named(tmp_path, name, words):
    whole = tmp_path / "whole.png"
    Image.effect_noise((64, 64), 9).save(whole)
    (tmp_path / "half.png").write_bytes(whole.read_bytes()[:900])
    (tmp_path / "text.png").write_text("no image")
    assert read_images([whole]) == (whole.read_bytes(),)
    with pytest.raises(DataError, match=words):
        read_images([whole, tmp_path / name])


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["nowhere", "--image", "a.png"], "nowhere: no such directory"),
        (["{empty}", "--image", "a.png"], "is no model"),
        (["{run}", "--image", "gone.png"], "--image gone.png: No such file"),
    ],
)
def test_the_command_reports_what_is_wrong_in_one_line(tmp_path, run, capsys, argv, words):
    (tmp_path / "empty").mkdir()
    named = [each.format(run=run, empty=tmp_path / "empty") for each in argv]
    with patch.dict(os.environ):  # the command sets those of its rank
        assert main(["ask", *named, "--question", "?"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("megatron-sr1: error: ") and words in line


def shown(**spans) -> str:
    from rich.console import Console

    whole = {"response": "R", "description": "D", "thoughts": "T", "answer": "A"}
    whole |= {"is_truncated": False, "reading": "\\boxed{B}", "reading_answer": "B"}
    console = Console(width=80, force_terminal=True, color_system=None)
    with console.capture() as captured:
        console.print(answer_table(Answered(**{**whole, **spans})))
    return captured.get()


def test_an_answer_shows_its_spans_and_the_reading():
    lines = [line.split() for line in shown().splitlines()]
    assert lines == [["description", "D"], ["thoughts", "T"], ["answer", "A"], ["reading", "B"]]


def test_missing_spans_and_readings_are_said():
    text = shown(description=None, reading=None, reading_answer=None, is_truncated=True)
    assert "response" in text and "(cut by" in text and "it takes a closed description" in text
    assert "(no answer) hm" in shown(reading="hm", reading_answer=None)


def test_what_a_model_writes_neither_formats_nor_moves_the_cursor():
    text = shown(description="\x1b[2J[bold red]a[/]\x07", answer="\u202eb")
    assert "\x1b[2J" not in text and "\x07" not in text and "\u202e" not in text
    assert "[bold red]a[/]" in text
