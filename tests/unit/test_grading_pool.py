"""Grading in other processes: the same verdicts whatever the timing, limits, failures, the end."""

import os
import random
import signal
import subprocess
import sys
import time

import psutil
import pytest

from megatron_sr1.config.rollout import RewardConfig
from megatron_sr1.errors import GradingError, GradingLimit
from megatron_sr1.rewards import math_worker
from megatron_sr1.rewards.answered import Finished
from megatron_sr1.rewards.grading_pool import GradingPool
from megatron_sr1.rewards.score import Scorer
from megatron_sr1.trainer.grading import to_grade
from tests.rollout_case import case
from tests.unit.test_rewards_functions import boxed, finished, written
from tests.unit.test_scoring import SLOW, Texts, group
from tools.grading_rate import make_answer

CONFIG = RewardConfig("vision_sr1", grader_timeout_seconds=5.0)


def answers(count, samples=4):
    """Prompts of several kinds, algebra among them, some with a description and a reading."""
    chance, found = random.Random(3), []
    for index in range(count):
        gold, answer, question = make_answer(index, chance)
        for number in range(samples):
            given = finished(answer if number % 2 else "0", number, index, gold)
            if number == 1:
                given = finished(answer, number, index, gold, read=answer)
            found.append(given)
    return found


@pytest.fixture(scope="module")
def pool():
    with GradingPool(CONFIG) as pool:
        yield pool


def test_verdicts_are_those_of_grading_one_after_the_other_whatever_the_order(pool):
    asked = answers(30)
    with Scorer(CONFIG) as scorer:
        wanted = [scorer.score(each.name, each.rollout, each.example) for each in asked]
    assert len({reward.because for reward in wanted}) > 4
    for seed in (1, 2):
        order, chance = list(asked), random.Random(seed)
        chance.shuffle(order)
        while order:
            size = chance.randrange(1, 9)
            pool.submit(order[:size], 4)
            order = order[size:]
        assert pool.results(asked) == wanted
    assert pool.results(asked) == wanted  # nothing was submitted before


def test_a_reward_is_that_of_this_step_however_late_its_rollouts_are_sorted(pool, monkeypatch):
    queue_up = pool._queue_up

    def late(*arguments):
        time.sleep(0.1)
        queue_up(*arguments)

    for answer in ("1", "2"):  # of the same prompts in two steps
        asked = [finished(answer, number, 0, "1") for number in range(4)]
        pool.submit(asked, 4)
        while any(pool._known.get(each.key) is None for each in asked):
            time.sleep(0.01)
        with monkeypatch.context() as patched:
            patched.setattr(pool, "_queue_up", late)
            rewards = pool.results(asked)
        assert [reward.accuracy for reward in rewards] == [float(answer == "1")] * 4
        time.sleep(0.3)


def test_a_batch_is_the_responses_to_a_prompt_in_their_order_whatever_came_first(tmp_path):
    text = (
        "def reward(*, responses):\n"
        "    return [len(responses) == 4 and int(r[-2]) == k for k, r in enumerate(responses)]\n"
    )
    config = RewardConfig("vision_r1", function=written(tmp_path, text))
    asked = [finished(f"{index}{k}", k, index) for index in (5, 4) for k in range(4)]
    with GradingPool(config) as pool:
        for each in reversed(asked):
            pool.submit([each], 4)
        rewards = pool.results(asked)
    assert [reward.accuracy for reward in rewards] == [1] * 8


def test_a_limit_leaves_its_prompt_out_and_costs_its_time_once():
    rollouts = [*group(0, "1+x", *(f"{SLOW}+{n}" for n in range(6))), *group(1, "x+x", "3x")]
    asked = [to_grade(rollout, Texts()) for rollout in rollouts]
    config = RewardConfig("vision_r1", grader_timeout_seconds=1.5, workers=1)
    with GradingPool(config) as pool:
        for each in asked:
            pool.submit([each], 7)
        right, *limits, doubled, tripled = pool.results(asked)
    assert (right.accuracy, doubled.accuracy, tripled.accuracy) == (1, 1, 0)
    assert {type(limit) for limit in limits} == {GradingLimit}
    assert len({str(limit) for limit in limits}) == 1, "more than one was compared"


def test_a_process_that_dies_is_replaced(pool):
    asked = answers(2)
    wanted = pool.results(asked)
    for process in pool._processes:
        os.kill(process.pid, signal.SIGKILL)
    assert pool.results(asked) == wanted


def test_a_broken_gold_answer_stops_the_run_with_the_next_rollout(pool):
    with GradingPool(CONFIG) as pool:
        pool.submit([finished("1", gold="$")], 1)
        with pytest.raises(GradingError, match="a.tar sample 0 rollout 0: the gold answer is '.'"):
            for number in range(1, 1000):
                pool.submit([finished("1", number)], 1)
                time.sleep(0.02)


def test_a_grading_process_that_does_not_start_is_an_error(monkeypatch):
    monkeypatch.setattr("megatron_sr1.rewards.grading_pool.COMMAND", ("/bin/false",))
    with GradingPool(CONFIG) as pool, pytest.raises(GradingError, match=r"exit status 1"):
        pool.results([finished("1")])


def test_the_users_traceback_is_kept_for_the_stack_file(tmp_path):
    function = written(tmp_path, "def reward(*, gold): return absent\n")
    with GradingPool(RewardConfig("vision_r1", function=function)) as pool:
        with pytest.raises(GradingError) as caught:
            pool.results([finished("1")])
    assert "NameError: name 'absent' is not defined" in str(caught.value.__cause__)


PARENT = """
import os, psutil
from megatron_sr1.config.rollout import RewardConfig
from megatron_sr1.rewards.answered import Finished
from megatron_sr1.rewards.grading_pool import GradingPool
from tests.rollout_case import case
pool = GradingPool(RewardConfig("vision_r1", grader_timeout_seconds=120))
pool.results([Finished("s", *case(r"\\boxed{1+x}", "x+1"))])
print(*(child.pid for child in psutil.Process().children(recursive=True)), flush=True)
pool.submit([Finished("s", *case(r"\\boxed{(x+y+z)^{99}}", "x+1"))], 1)
os.kill(os.getpid(), 9)
"""


def test_all_processes_exit_when_the_rank_is_killed():
    # Not captured: a process that is left would keep the pipe open.
    command, null = [sys.executable, "-c", PARENT], subprocess.DEVNULL
    ran = subprocess.run(command, stdout=subprocess.PIPE, stderr=null, timeout=300)
    assert ran.returncode == -signal.SIGKILL
    left = [int(pid) for pid in ran.stdout.split()]
    assert len(left) == 2  # one that grades, one for its algebra
    until = time.monotonic() + 30
    while any(map(is_running, left)):
        assert time.monotonic() < until, "they outlived the rank by 30 s"
        time.sleep(0.1)


def is_running(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_closing_ends_processes_that_are_busy(tmp_path):
    text = "import time\ndef reward(*, gold): time.sleep(600)\n"
    config = RewardConfig("vision_r1", function=written(tmp_path, text))
    with GradingPool(config) as pool:
        pool.submit([finished("1")], 1)
        time.sleep(0.3)
        pids = [process.pid for process in pool._processes]
    assert pids and not any(map(is_running, pids))


def test_a_graders_memory_limit_is_that_of_its_algebra(monkeypatch):
    monkeypatch.setattr(math_worker, "MEMORY_BYTES", 1)  # what grades is not watched
    with GradingPool(CONFIG) as pool:
        time.sleep(0.1)
        (reward,) = pool.results([Finished("s", *case(boxed(5), "5"))])
    assert not isinstance(reward, GradingLimit) and reward.accuracy == 1
