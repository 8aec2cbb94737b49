"""The user's reward function: its arguments and results, and that no failure scores 0."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_sr1.cli import main
from megatron_sr1.config.rollout import RewardConfig
from megatron_sr1.errors import ConfigError, GradingError
from megatron_sr1.evaluation.lines import evaluation_line
from megatron_sr1.records import Completion, Reading
from megatron_sr1.rewards.score import Scorer, rates
from megatron_sr1.rewards.user_reward import ALWAYS, UserReward
from megatron_sr1.trainer.grading import Scored
from megatron_sr1.trainer.grading import score as score_rollouts
from megatron_sr1.trainer.recording import reward_means
from tests.rollout_case import case
from tests.unit.test_scoring import Texts, group

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "own_reward.py"
RESPONSE = "<description> 3 5 6 </description> <think> t </think> \\boxed{12}"
READING = "<think> t </think> \\boxed{14}"
GIVEN = {
    "response": "r",
    "gold": "14",
    "question": "q",
    "description": None,
    "metadata": {"digits": [1]},
}


def reading(text: str) -> Reading:
    return Reading((Completion((1,), (), text, "stop"),))


def written(tmp_path, body: str) -> str:
    file = tmp_path / "mine.py"
    file.write_text(f"def reward(response, gold, **rest):\n    {body}\n")
    return f"{file}:reward"


def test_the_example_rewards_close_answers():
    function = UserReward(f"{EXAMPLE}:closeness")
    for answer, paid in (("14", 1.0), ("12", 0.8), ("99", 0.0)):
        given = GIVEN | {"response": f"so \\boxed{{{answer}}}"}
        assert function("s", **given) == pytest.approx(paid)
    assert function("s", **GIVEN) == 0.0


def test_it_judges_both_passes_in_place_of_the_grader():
    with Scorer(RewardConfig("vision_sr1", function=f"{EXAMPLE}:closeness")) as scorer:
        reward = scorer.score("s", *case(RESPONSE, "14", "sum?", "3 5 6", reading(READING), True))
    assert (reward.accuracy, reward.self_reward) == (pytest.approx(0.8), 1.0)
    assert reward.total == pytest.approx(0.9 * 0.8 + 0.1 + 1.0)
    assert (reward.answer, reward.reading_answer) == ("12", "14")


def test_it_receives_the_sample_and_cannot_change_it(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "seen = []\n"
        "def reward(**given):\n"
        "    seen.append({**given, 'metadata': dict(given['metadata'])})\n"
        "    given['metadata']['source'] = 'changed'\n"
        "    return True\n"
    )
    metadata = {"source": "train"}
    with Scorer(RewardConfig("vision_sr1", function=f"{file}:reward")) as scorer:
        rollout, example = case(RESPONSE, "14", "sum?", "3 5 6", reading(READING), True)
        scorer.score("s", rollout, replace(example, metadata=metadata))
    first, second = scorer.function._call.__globals__["seen"]
    assert set(first) == set(ALWAYS) and metadata == {"source": "train"}
    assert first == {
        "response": RESPONSE,
        "gold": "14",
        "question": "sum?",
        "description": "3 5 6",
        "metadata": {"source": "train"},
    }
    assert second == first | {"response": READING}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return 1 / 0", r"raised ZeroDivisionError: division by zero \(mine.py line 2\)"),
        ("raise SystemExit(0)", r"raised SystemExit: 0 \(mine.py line 2\)"),
        ("return float('nan')", "returned nan; expected a number from 0 to 1"),
        ("return float('inf')", "returned inf"),
        ("return 1.5", r"returned 1\.5"),
        ("return -1", "returned -1"),
        ("return None", "returned None"),
        ("return '1'", "returned '1'"),
        ("return {'value': 1.0}", r"returned {'value': 1.0}; expected a number .* as 'score'"),
    ],
)
def test_a_failure_names_sample_and_function_and_never_scores_0(tmp_path, body, message):
    with Scorer(RewardConfig("vision_r1", function=written(tmp_path, body))) as scorer:
        named = rf"a.tar sample 000001 rollout 0: reward.function={tmp_path}/mine.py:reward "
        with pytest.raises(GradingError, match=named + message):
            score_rollouts(group(1, "2x"), Texts(), scorer)


def test_the_users_traceback_is_kept_for_the_stack_file(tmp_path):
    with Scorer(RewardConfig("vision_r1", function=written(tmp_path, "return 1 / 0"))) as scorer:
        with pytest.raises(GradingError) as caught:
            scorer.score("s", *case("r", "1", "q"))
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


@pytest.mark.parametrize(
    "body", ["return True", "return 1", "import numpy; return numpy.float32(1)"]
)
def test_any_type_of_real_number_is_accepted(tmp_path, body):
    assert UserReward(written(tmp_path, body))("s", **GIVEN) == 1.0


@pytest.mark.parametrize(
    ("named", "content", "message"),
    [
        ("absent.py:f", None, "absent.py: no such file"),
        ("mine.py", "", "expected FILE.py:NAME"),
        ("mine.txt:f", "", "expected FILE.py:NAME"),
        ("mine.py:g", "def f(): pass\nx = 1", "no function g in the file; it has f"),
        ("mine.py:x", "x = 1", "no function x in the file; it has no function"),
        ("mine.py:f", "def f(:", r"raised SyntaxError"),
        ("mine.py:f", "import absent_module", r"ModuleNotFoundError.*\(mine.py line 1\)"),
        ("mine.py:f", "def f(response, score): pass", "missing a required argument: 'score'"),
        ("mine.py:f", "def f(solution_str, **_): pass", "called with response, gold, question"),
    ],
)
def test_a_function_that_cannot_be_loaded_is_a_one_line_error(tmp_path, named, content, message):
    if content is not None:
        (tmp_path / named.split(":")[0]).write_text(content)
    with pytest.raises(ConfigError, match=rf"^reward.function={tmp_path}/{named}.*{message}"):
        UserReward(f"{tmp_path}/{named}")


def test_fractional_rewards_count_as_right_from_one_half(tmp_path):
    scored = []
    with Scorer(RewardConfig("vision_sr1", function=f"{EXAMPLE}:closeness")) as scorer:
        for answer, read in ((12, 14), (14, 2), (2, 14)):  # 0.8 and 1, 1 and 0, 0 and 1
            response = RESPONSE.replace("12", str(answer))
            heard = reading(READING.replace("14", str(read)))
            reward = scorer.score("s", *case(response, "14", "q", "3 5 6", heard, True))
            scored.append(Scored(group(2, str(answer))[0], reward))
    means = reward_means(scored)
    assert means["reward/accuracy"] == pytest.approx(0.6)
    assert means["reward/shortcut_rate"] == means["table/pass1_right_pass2_right"] == 1 / 3
    assert means["table/pass1_wrong_pass2_right"] == 1 / 3
    lines = [evaluation_line(s.rollout, s.reward, Texts().example(2), "p") for s in scored]
    assert [line["shortcut"] for line in lines] == [0, 1, 0]
    assert rates(lines)["accuracy"] == pytest.approx(0.6)


def test_a_hanging_function_ends_at_the_deadline_of_its_phase(tmp_path):
    (tmp_path / "mine.py").write_text("def reward(**given):\n    while True:\n        pass\n")
    program = (
        "from megatron_sr1.rewards.user_reward import UserReward\n"
        "from megatron_sr1.runtime import failure\n"
        f"reward = UserReward({str(tmp_path / 'mine.py:reward')!r})\n"
        f"with failure.guard({str(tmp_path)!r}), failure.deadline('reward', 0.5):\n"
        f"    reward('s', **{GIVEN!r})\n"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "reward took longer than its deadline of 0.5 s" in done.stderr
    stacks = (tmp_path / "stacks" / "rank_0.txt").read_text()
    assert re.search(r'mine.py", line [23] in reward', stacks)


def test_a_dry_run_loads_the_function(tmp_path, capsys):
    recipe = str(ROOT / "examples" / "digits_cpu.yaml")
    assert main(["train", recipe, f"reward.function={EXAMPLE}:closeness", "--dry-run"]) == 0
    assert f"answers judged by {EXAMPLE}:closeness" in capsys.readouterr().out
    assert main(["train", recipe, f"reward.function={EXAMPLE}:other", "--dry-run"]) == 2
    assert "no function other in the file; it has closeness" in capsys.readouterr().err
