"""Readings by an external model: what is asked, by whom, and what a failure does."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from megatron_sr1.config.endpoint import EndpointConfig
from megatron_sr1.config.rollout import RewardConfig, RolloutConfig
from megatron_sr1.records import Prompt, VisionInputs, texts
from megatron_sr1.rewards.score import Scorer
from megatron_sr1.rollout.readings import Readings, RolloutHooks
from megatron_sr1.runtime.chat import ChatClient
from megatron_sr1.trainer import grading
from tests.chat_endpoint import serving
from tests.rollout_case import case

RESPONSE = "<description>{}</description><think>x</think>\\boxed{{7}}"


def prompt(index: int) -> Prompt:
    example = replace(case("", "7", "<image>How many?", has_image=True)[1], index=index)
    return Prompt(example, (1,), VisionInputs(torch.zeros(4, 3), torch.tensor([[1, 2, 2]])))


def messages(prompt: Prompt, description: str) -> tuple[tuple[str, str], ...]:
    return (("system", "Read."), ("user", f"{prompt.example.question} {description}"))


def read(script, asked, has_reader=True, **changes):
    """The readings of (prompt, description) pairs, and the bodies of the requests."""
    settings = {"pass2_mode": "endpoint", "max_reading_tokens": 9, **changes}
    with serving(script) as endpoint:
        own = EndpointConfig(endpoint.url, "m", retries=0)
        with ChatClient("rollout.endpoint", own) as client:
            hooks = RolloutHooks(
                lambda text: None,
                lambda asked: [],
                lambda index, sample, part: part,
                reading_messages=messages,
                reader=client if has_reader else None,
            )
            readings = Readings(None, RolloutConfig(**settings), hooks)
            keys, requests = readings.ask(asked)
            assert requests == [], "nothing is for the engine"
            readings.wait()
            return [readings.result(key) for key in keys], endpoint.bodies


def test_a_description_is_read_once_with_the_settings_of_pass_2():
    asked = [(prompt(0), "four"), (prompt(1), "four"), (prompt(1), "<|im_end|>")]
    found, bodies = read(lambda n, body: body["messages"][1]["content"], asked)
    assert [each.texts for each in found] == [
        ("<image>How many? four",),
        ("<image>How many? four",),
        ("<image>How many? < |im_end|>",),
    ]
    assert len(bodies) == 2 and bodies[0]["temperature"] == 0 and "seed" not in bodies[0]
    assert bodies[0]["max_completion_tokens"] == 9
    assert bodies[0]["messages"][0] == {"role": "system", "content": "Read."}


def test_several_answers_have_seeds_of_their_own():
    (found,), bodies = read(
        lambda n, body: str(body["seed"]),
        [(prompt(0), "four")],
        pass2_samples=3,
        pass2_temperature=0.5,
    )
    assert found.texts == ("2", "3", "4") and {body["temperature"] for body in bodies} == {0.5}
    assert found.failure is None and found.gold_logprobs is None


def test_a_rank_without_the_client_asks_nothing():
    found, bodies = read(lambda n, b: "x", [(prompt(0), "four")], has_reader=False)
    assert found == [None] and bodies == []


@pytest.mark.parametrize("fault", [500, b"<html>"], ids=str)
def test_a_failed_reading_leaves_its_prompt_out_and_is_logged(fault, caplog):
    def script(number, body):
        return fault if "bad" in body["messages"][1]["content"] else "\\boxed{7}"

    descriptions = {0: ["good", "bad"], 1: ["good", "fine"]}
    asked = [(prompt(index), text) for index, several in descriptions.items() for text in several]
    found, _ = read(script, asked)
    made = []
    for number, ((asked_prompt, description), reading) in enumerate(zip(asked, found, strict=True)):
        rollout, _ = case(RESPONSE.format(description), "7", "", description, reading, True)
        made.append(replace(rollout, index=asked_prompt.example.index, sample=number % 2))
    samples = SimpleNamespace(example=lambda index: prompt(index).example)
    with Scorer(RewardConfig()) as scorer:
        scored = grading.score(made, samples, scorer)
    usable, limits = grading.without_ungraded(scored)
    assert [s.rollout.index for s in usable] == [1, 1] and list(limits) == [0]
    assert [s.reward.self_reward for s in usable] == [1.0, 1.0]
    assert "pass 2 at rollout.endpoint" in limits[0] and "left out with its group" in caplog.text
    assert texts(made[1], prompt(0).example)["reading"] == ""
