"""Reward functions of a user's: for a prompt's batch, coroutines, for the total, with images.

Those of examples/ are run, in the grading processes, and each failure is one clear line.
"""

import io
import time
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from megatron_sr1.config.rollout import OverlongConfig, RewardConfig
from megatron_sr1.errors import ConfigError, GradingError
from megatron_sr1.records import Completion, Reading
from megatron_sr1.rewards.answered import Finished
from megatron_sr1.rewards.grading_pool import GradingPool
from megatron_sr1.rewards.score import Scorer
from megatron_sr1.rewards.user_reward import UserReward
from megatron_sr1.trainer.grading import Scored
from megatron_sr1.trainer.recording import reward_means
from tests.chat_endpoint import serving
from tests.rollout_case import case

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def boxed(answer):
    return f"<description> 3 5 6 </description> <think> t </think> \\boxed{{{answer}}}"


def finished(answer, sample=0, index=0, gold="14", read=None, num_tokens=1, image=None):
    reading = None if read is None else Reading((Completion((1,), (), boxed(read), "stop"),))
    described = None if read is None else "3 5 6"
    rollout, example = case(boxed(answer), gold, "sum?", described, reading, read is not None)
    completion = replace(rollout.completion, token_ids=tuple(range(num_tokens)))
    rollout = replace(rollout, index=index, sample=sample, completion=completion)
    files = None if image is None else lambda: [image]
    return Finished(f"a.tar sample {index} rollout {sample}", rollout, example, files)


def written(tmp_path, text, name="reward"):
    file = tmp_path / "mine.py"
    file.write_text(text)
    return f"{file}:{name}"


def graded(config, *rollouts, longest=0):
    with GradingPool(config, longest) as pool:
        pool.submit(rollouts, len(rollouts))
        return pool.results(rollouts)


def test_the_batch_example_gets_a_prompts_responses_and_an_argument_and_returns_metrics():
    function = f"{EXAMPLES}/reward_batch.py:within_tolerance"
    config = RewardConfig("vision_r1", function=function, arguments={"tolerance": 0.1})
    asked = [finished(a, n) for n, a in enumerate(("14", "13", "7", "x"))]
    rewards = graded(config, *asked)
    assert [reward.accuracy for reward in rewards] == [1, 1, 0, 0]
    assert [reward.metrics["distinct"] for reward in rewards] == [3, 3, 3, 3]
    assert [reward.metrics["error"] for reward in rewards] == [0, 1 / 14, 0.5, 1]
    means = reward_means([Scored(a.rollout, r) for a, r in zip(asked, rewards, strict=True)])
    assert means["reward/distinct"] == 3 and means["reward/error"] == pytest.approx(22 / 14 / 4)
    with Scorer(config) as scorer:
        assert scorer.results(asked) == rewards


def test_the_async_example_has_twenty_calls_at_a_time():
    def script(number, body):
        time.sleep(0.2)
        return "Yes." if "boxed{14}" in body["messages"][0]["content"] else "no"

    asked = [finished("14" if n % 2 else "15", n) for n in range(20)]
    with serving(script) as endpoint:
        arguments = {"base_url": endpoint.url, "model": "m"}
        function = f"{EXAMPLES}/reward_async.py:judged"
        config = RewardConfig("vision_r1", function=function, arguments=arguments, workers=1)
        with GradingPool(config) as pool:
            pool.results([finished("14", 20)])  # connects
            started = time.monotonic()
            rewards = pool.results(asked)
            seconds = time.monotonic() - started
        assert endpoint.most == 20
    assert seconds < 20 * 0.2 / 2
    assert [reward.accuracy for reward in rewards] == [n % 2 for n in range(20)]


def test_the_example_for_the_total_leaves_the_graders_verdicts_as_they_are():
    function = f"{EXAMPLES}/reward_total.py:signed"
    plain = RewardConfig("vision_sr1")
    total = replace(plain, function=function, function_for="total", function_range=[-1, 1])
    asked = [finished(a, n, read=r) for n, (a, r) in enumerate((("14", "14"), ("14", "9"), "99"))]
    rewards = graded(total, *asked)
    assert [reward.total for reward in rewards] == [1, 0, -1]
    with Scorer(plain) as scorer:
        others = scorer.results(asked)
    assert [other.total for other in others] == pytest.approx([2.0, 1.0, 0.1])
    assert [replace(r, total=o.total) for r, o in zip(rewards, others, strict=True)] == others


def test_the_image_example_opens_the_picture():
    buffer = io.BytesIO()
    Image.new("RGB", (300, 400)).save(buffer, "PNG")  # a diagonal of 500 pixels
    config = RewardConfig("vision_r1", function=f"{EXAMPLES}/reward_image.py:near")
    points = ("(30, 40)", "(30, 65)", "(300, 400)", "30")
    asked = [finished(p, n, 0, "(30, 40)", image=buffer.getvalue()) for n, p in enumerate(points)]
    assert [reward.accuracy for reward in graded(config, *asked)] == [1, 0.5, 0, 0]


def test_paths_of_images_exist_while_they_are_graded_and_no_longer(tmp_path):
    text = (
        "def reward(*, image_paths):\n"
        f"    open({str(tmp_path / 'seen')!r}, 'w').write(image_paths[0])\n"
        "    return open(image_paths[0], 'rb').read() == b'pixels'\n"
    )
    config = RewardConfig("vision_r1", function=written(tmp_path, text))
    (reward,) = graded(config, finished("1", image=b"pixels"))
    assert reward.accuracy == 1 and not Path((tmp_path / "seen").read_text()).exists()


def test_one_function_is_told_more_only_if_it_asks(tmp_path):
    text = "def reward(*, response, num_tokens, **rest): return {'score': 1, 'n': num_tokens}\n"
    with Scorer(RewardConfig("vision_r1", function=written(tmp_path, text))) as scorer:
        (reward,) = scorer.results([finished("1", num_tokens=7)])
    assert reward.metrics == {"n": 7}


def test_readings_are_a_batch_of_their_own(tmp_path):
    text = (
        "def reward(*, responses, descriptions):\n"
        "    return [len(responses) + (d is not None) for d in descriptions]\n"
    )
    config = RewardConfig("vision_sr1", function=written(tmp_path, text), function_range=[0, 9])
    rewards = graded(config, finished("1", 0, read="1"), finished("1", 1), finished("2", 2))
    assert [(r.accuracy, r.self_reward) for r in rewards] == [(4, 2), (3, None), (3, None)]


def test_the_best_result_over_the_gold_answers_counts_with_its_metrics(tmp_path):
    text = "def reward(*, gold): return {'score': -len(gold), 'length': len(gold)}\n"
    function = written(tmp_path, text)
    with Scorer(RewardConfig("vision_r1", function=function, function_range=[-9, 0])) as scorer:
        asked = finished("1")
        several = replace(asked.example, answer="333", other_answers=("1", "22"))
        (reward,) = scorer.results([replace(asked, example=several)])
    assert (reward.accuracy, reward.metrics) == (-1, {"length": 1})


@pytest.mark.parametrize(
    ("tokens", "penalty"), [(5, 0), (6, 0), (7, 0.25), (9, 0.75), (10, 1), (12, 1)]
)
@pytest.mark.parametrize("function_for", ["accuracy", "total"])
def test_long_responses_are_penalised_softly(tmp_path, tokens, penalty, function_for):
    function = written(tmp_path, "def reward(**_): return 1\n")
    config = RewardConfig(
        "vision_r1", function=function, function_for=function_for, format_weight=0
    )
    config = replace(config, accuracy_weight=1, overlong=OverlongConfig(4, 0.5))
    with Scorer(config, 10) as scorer:
        (reward,) = scorer.results([finished("14", num_tokens=tokens)])
    assert reward.overlong == penalty and reward.total == 1 - 0.5 * penalty
    assert reward_means([Scored(None, reward)])["reward/overlong"] == penalty


FAILURES = {
    "raises": ("def reward(*, responses): return 1 / 0", r"raised ZeroDivisionError.*\(mine.py"),
    "wrong length": ("def reward(*, responses): return [1]", "returned 1 scores for 2 responses"),
    "no list": ("def reward(*, responses): return 1", "returned 1 for 2 responses"),
    "nan": (
        "def reward(*, responses): return [1, float('nan')]",
        r"returned nan; expected a number from 0 to 1 \(reward.function_range\)",
    ),
    "out of range": ("def reward(*, response): return 1.5", "returned 1.5; expected a number"),
    "metric": (
        "def reward(*, response): return {'score': 1, 'm': None}",
        "returned the metric 'm': None; expected a finite number",
    ),
    "taken": (
        "def reward(*, response): return {'score': 1, 'accuracy': 0}",
        "returned the metric 'accuracy'; expected a name of letters, digits and _ that the trainer",
    ),
    "no name": (
        "def reward(*, response): return {'score': 1, 'self_reward/a': 0}",
        "returned the metric 'self_reward/a'; expected a name",
    ),
    "hangs": (
        "def reward(*, response):\n    while True: pass",
        r"took more than 1 s \(reward.function_timeout_seconds\)",
    ),
    "hangs in C": (
        "import re\ndef reward(*, response): re.match('(a|a)*b', 'a' * 60)",
        r"took more than 1 s \(reward.function_timeout_seconds\)",
    ),
    "waits for ever": (
        "import asyncio\nasync def reward(*, response): await asyncio.sleep(99)",
        r"took more than 1 s \(reward.function_timeout_seconds\)",
    ),
    "is cancelled": (
        "import asyncio\nasync def reward(*, response): raise asyncio.CancelledError",
        "raised CancelledError",
    ),
    "exits": ("import os\ndef reward(*, response): os._exit(7)", r"ended \(exit status 7\)"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failure_is_one_line_that_names_sample_and_function(tmp_path, failure):
    text, message = FAILURES[failure]
    function = written(tmp_path, text)
    config = RewardConfig("vision_r1", function=function, function_timeout_seconds=1, workers=1)
    with pytest.raises(GradingError) as caught:
        graded(config, finished("1", 0), finished("2", 1))
    assert caught.match(rf"^a.tar sample 0 rollout [01]: reward.function={function}:? .*{message}")
    assert "\n" not in str(caught.value)


def test_a_function_that_does_not_load_is_refused_before_anything_is_graded(tmp_path):
    with pytest.raises(ConfigError, match="no function other in the file; it has reward"):
        GradingPool(RewardConfig(function=written(tmp_path, "def reward(): pass", "other")))
    GradingPool(RewardConfig(function="absent.py:f"), is_leader=False)  # it never grades


@pytest.mark.parametrize(
    ("signature", "arguments", "message"),
    [
        ("*, response", {"odd": 1}, "got an unexpected keyword argument 'odd'"),
        ("*, response, odd", {}, "missing a required argument: 'odd'"),
        ("**rest", {"gold": 1}, "reward.arguments.gold is what the trainer passes"),
        ("*, response, accuracy", {}, "missing a required argument: 'accuracy'"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(tmp_path, signature, arguments, message):
    function = written(tmp_path, f"def reward({signature}): return 1")
    with pytest.raises(ConfigError, match=message):
        UserReward(function, RewardConfig(arguments=arguments))


def test_a_plain_function_may_start_a_loop_of_its_own(tmp_path):
    text = (
        "import asyncio\n"
        "async def one(): return 1\n"
        "def reward(*, response): return asyncio.run(one())\n"
    )
    assert UserReward(written(tmp_path, text))("s", gold="", response="r") == 1
