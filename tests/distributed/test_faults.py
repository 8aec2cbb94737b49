"""One rank of two raises, is killed or hangs, in every phase: all end soon, loudly, nothing lost.

The ranks are real ones on gloo with the real engine; faults.py wraps the functions that fail.
Forked ranks have no torchrun above them, so what ends the others here is the watch alone, as
under srun; three faults and two signals go through the command and its torchrun. Not covered:
ranks on several hosts.
"""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_sr1.config.loading import load_config
from megatron_sr1.demo.digits import make_digits
from megatron_sr1.observability.metrics import read_lines
from megatron_sr1.runtime.failure import LINGER_SECONDS

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).parent / "ranks" / "faults.py"
DEADLINE_SECONDS, SAVE_SECONDS = 6.0, 25.0
MARGIN_SECONDS = 30.0
"""For two loaded cores; the usual deadlines are ten minutes here."""
KINDS = ("raise", "kill", "hang")
LAST_WORDS = {
    "raise": "rank 1: RuntimeError: the moon is missing (in {phase})",
    "kill": "rank 1: its process is gone (killed from outside, or out of memory)",
    "hang": "{phase} took longer than its deadline of {seconds:g} s",
    "engine": "rank 1: RuntimeError: the moon is missing (in {phase})",
    "term": "rank 1: stopped from outside by SIGTERM",
}
PHASE_OF = {"load": "setup", "pass2": "pass1"} | dict.fromkeys(
    ("forward", "backward", "optimizer"), "update"
)
COMMON = (
    *("launch.setup_deadline_seconds=600", "launch.phase_deadline_seconds=600"),
    *("checkpoint.every_steps=1", "checkpoint.export_hf=false"),
    *("evaluation.sets=", "evaluation.every_steps=0", "evaluation.at_start=false"),
    *("rollout.pass2=barrier", "rollout.canary_bound=1e-3"),
)


def deadline_of(phase):
    return SAVE_SECONDS if phase == "save" else DEADLINE_SECONDS


class Server:
    """faults.py with everything imported."""

    def __init__(self):
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, str(SCRIPT), "server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            cwd=ROOT,
            text=True,
        )

    def run(self, **case):
        self._process.stdin.write(json.dumps(case) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self):
        self._process.stdin.close()
        self._process.wait(timeout=120)


class Stage:
    """A stage with a checkpoint of its first step, to fail in the second."""

    def __init__(self, server, folder, config, *overrides):
        self._server, self._folder = server, folder
        self.config, self._overrides = str(config), [*overrides, *COMMON]
        self.base = folder / "base"
        first = self.run(self.base, "none", "none", "optimizer.num_steps=1")
        assert first["statuses"] == [0, 0], first["output"][-4000:]

    def overrides(self, output, *more):
        return [*self._overrides, "optimizer.num_steps=2", *more, f"output={output}"]

    def copy(self, name):
        """A run directory with that checkpoint and its line of metrics."""
        output = self._folder / name
        shutil.copytree(self.base / "checkpoints", output / "checkpoints")
        shutil.copy(self.base / "metrics.jsonl", output)
        return output

    def run(self, output, phase, kind, *more):
        return self._server.run(
            **{"phase": phase, "fault": kind, "rank": 1, "deadline": deadline_of(phase)},
            **{"config": self.config, "overrides": self.overrides(output, *more)},
            **{"output": str(output), "limit": 300},
        )


@pytest.fixture(scope="module")
def sft(tiny_model, tmp_path_factory):
    """Supervised fine-tuning, without the engine."""
    folder = tmp_path_factory.mktemp("sft")
    shards = make_digits(folder / "data", 1, num_train=2, num_eval=2, num_cold_start=16)
    overrides = [f"data.train={shards['cold_start']}", "data.prompts_per_step=4", "stage=sft"]
    server = Server()
    example = ROOT / "examples" / "digits_cpu.yaml"
    yield Stage(server, folder, example, f"model.path={tiny_model}", *overrides)
    server.close()


@pytest.fixture(scope="module")
def grpo(demo, tmp_path_factory):
    """The demo's GRPO stage from its cold start, with few prompts."""
    small = ["data.prompts_per_step=4", "algorithm.prompts_per_update=4"]
    server, config = Server(), demo / "vision_sr1" / "config.json"
    yield Stage(server, tmp_path_factory.mktemp("grpo"), config, *small)
    server.close()


def digests(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def check_nothing_lost(stage, run_dir, groups):
    """The checkpoint is what it was, and loads; the lines are still there."""
    checkpoints = run_dir / "checkpoints"
    assert (checkpoints / "latest").read_text() == "step_1\n"
    before = digests(stage.base / "checkpoints" / "step_1")
    assert digests(checkpoints / "step_1") == before and len(before) > 5
    assert read_lines(run_dir / "metrics.jsonl")[:1] == read_lines(stage.base / "metrics.jsonl")
    from megatron_sr1 import stages

    config = load_config(Path(stage.config), stage.overrides(run_dir))
    context, _, actor, _ = stages.start(config, groups)
    context.close()
    assert context.step == 1 and actor.scheduler.num_steps == 1


def check_stacks(run_dir, ranks=(0, 1)):
    for rank in ranks:
        stacks = (run_dir / "stacks" / f"rank_{rank}.txt").read_text()
        assert "most recent call first" in stacks, rank


def check_fault(stage, phase, kind, groups, *more):
    run_dir = stage.copy(f"{phase}_{kind}")
    found = stage.run(run_dir, phase, kind, *more)
    output = found["output"]
    assert not found["late"] and found["seconds"] is not None, output[-4000:]
    assert not found["left"], "processes that a rank started are still there"
    waited = deadline_of(phase) if kind == "hang" else 0.0
    assert found["seconds"] < waited + LINGER_SECONDS + MARGIN_SECONDS, output[-4000:]
    assert all(found["statuses"]), found["statuses"]
    last = output.splitlines()[-3:]
    words = LAST_WORDS[kind].format(phase=PHASE_OF.get(phase, phase), seconds=waited)
    assert any(line.startswith("megatron-sr1: error: ") and words in line for line in last), output
    if kind == "engine":
        assert "in execute_model" in output and "vllm/v1/engine/core.py" in output
    if kind == "hang":
        place = f"rank 1 in {PHASE_OF.get(phase, phase)}, hang (distributed/ranks/faults.py:"
        if phase == "reward":  # a thread grades, for which the main one waits, on both ranks
            place = "ranks 0, 1 in reward, wait (lib/python"
        assert f"  {place}" in output
        assert "in hang" in (run_dir / "stacks" / "rank_1.txt").read_text()
    check_stacks(run_dir, (0,) if kind == "kill" else (0, 1))
    check_nothing_lost(stage, run_dir, groups)


@pytest.mark.parametrize(
    ("phase", "kind"), [("load", "kill"), ("backward", "raise"), ("save", "hang")]
)
def test_a_failing_rank_ends_all_of_a_supervised_run(sft, groups, phase, kind):
    check_fault(sft, phase, kind, groups)


SFT_CASES = [
    (phase, kind)
    for phase in ("load", "forward", "backward", "optimizer", "save")
    for kind in KINDS
    if (phase, kind) not in (("load", "kill"), ("backward", "raise"), ("save", "hang"))
]


@pytest.mark.slow
@pytest.mark.parametrize(("phase", "kind"), [*SFT_CASES, ("forward", "term")])
def test_a_failing_rank_ends_all_of_a_supervised_run_in_any_phase(sft, groups, phase, kind):
    check_fault(sft, phase, kind, groups)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("phase", ["pass1", "pass2", "reward", "sync"])
def test_a_failing_rank_ends_all_of_a_grpo_run(grpo, groups, phase, kind):
    check_fault(grpo, phase, kind, groups)


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["canary", "prompts", "share", "old_logprobs", "reference"])
def test_a_killed_rank_ends_all_of_a_grpo_run_in_any_phase(grpo, groups, phase):
    more = ("algorithm.prompts_per_update=2", "algorithm.kl_coefficient=0.01")
    check_fault(grpo, phase, "kill", groups, *more)


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["canary", "pass1", "pass2"])
def test_an_engine_that_dies_takes_the_run_down_with_its_own_traceback(grpo, groups, phase):
    """vLLM runs inside the rank: what is killed with the rank is the case above."""
    check_fault(grpo, phase, "engine", groups)


@pytest.mark.slow
def test_a_killed_grader_costs_its_prompt_alone(grpo):
    run_dir = grpo.copy("worker_die")
    found = grpo.run(run_dir, "worker", "die", "reward.workers=1")
    assert found["statuses"] == [0, 0] and not found["left"], found["output"][-4000:]
    assert f"{LEFT_OUT}: the grader ended (exit status -9)" in found["output"]
    lines = read_lines(run_dir / "metrics.jsonl")
    assert [line["reward/ungraded"] for line in lines] == [0, 1]


LEFT_OUT = "left out with its group: a sample: comparing answer '(x-2)(x+2)' with gold 'x^2-4'"


@pytest.mark.slow
def test_a_grader_that_sleeps_for_ever_costs_its_prompt_alone(grpo):
    run_dir = grpo.copy("worker_stop")
    found = grpo.run(run_dir, "worker", "stop", "reward.workers=1")
    assert found["statuses"] == [0, 0] and not found["left"], found["output"][-4000:]
    assert f"{LEFT_OUT} took more than 5 s" in found["output"]
    lines = read_lines(run_dir / "metrics.jsonl")
    assert [line["reward/ungraded"] for line in lines] == [0, 1]


@pytest.mark.slow
def test_a_grader_that_sleeps_too_often_for_what_was_asked_ends_the_run(grpo, groups):
    run_dir = grpo.copy("worker_stop_bound")
    found = grpo.run(run_dir, "worker", "stop", "reward.max_ungraded_share=0", "reward.workers=1")
    assert not found["late"] and all(found["statuses"]), found["output"][-4000:]
    assert LEFT_OUT in found["output"]
    last = found["output"].splitlines()[-1]
    assert "could not be graded, at most a share of 0 may (reward.max_ungraded_share)" in last
    check_nothing_lost(grpo, run_dir, groups)


def launch(stage, run_dir, phase, kind, deadline=0, *more):
    """The command itself, with its torchrun."""
    case = json.dumps({"phase": phase, "fault": kind, "rank": 1, "deadline": deadline})
    command = [sys.executable, str(SCRIPT), "launch", case, "train", stage.config]
    command += [*stage.overrides(run_dir), *more]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def end_of(process, run_dir, words):
    """Wait for the end; the words are in the last lines, and no process of the run is left."""
    output = process.communicate(timeout=150)[0].decode()
    assert process.returncode not in (0, None)
    last = [line for line in output.splitlines()[-3:] if line.startswith("megatron-sr1: error: ")]
    assert last and words in last[0], output[-4000:]
    left = subprocess.run(["pgrep", "-f", f"output={run_dir}"], capture_output=True, text=True)
    assert not left.stdout, left.stdout
    return output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("phase", "kind"), [("forward", "raise"), ("optimizer", "kill"), ("save", "hang")]
)
def test_the_command_says_last_what_ended_its_ranks(sft, groups, phase, kind):
    run_dir = sft.copy(f"command_{phase}_{kind}")
    more = ("launch.phase_deadline_seconds=25",) if kind == "hang" else ()
    started = time.monotonic()
    words = LAST_WORDS[kind].format(phase=PHASE_OF.get(phase, phase), seconds=25)
    end_of(launch(sft, run_dir, phase, kind, 0, *more), run_dir, words)
    assert time.monotonic() - started < 90
    check_stacks(run_dir, (0,) if kind == "kill" else (0, 1))
    check_nothing_lost(sft, run_dir, groups)


@pytest.mark.slow
@pytest.mark.parametrize("who", ["launcher", "rank"])
def test_sigterm_ends_the_run_with_its_cause_and_stacks(sft, groups, who):
    run_dir = sft.copy(f"sigterm_{who}")
    process = launch(sft, run_dir, "forward", "term" if who == "rank" else "hang")
    words = "stopped from outside by SIGTERM"
    if who == "launcher":
        until = time.monotonic() + 120
        while not (run_dir / "fault_at").exists():
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
    end_of(process, run_dir, words)
    assert process.returncode == 128 + signal.SIGTERM
    check_stacks(run_dir)
    check_nothing_lost(sft, run_dir, groups)


@pytest.mark.slow
def test_a_killed_launcher_leaves_no_rank_behind(sft, groups):
    run_dir = sft.copy("killed_launcher")
    process = launch(sft, run_dir, "forward", "hang")
    until = time.monotonic() + 120
    while not (run_dir / "fault_at").exists():
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.1)
    process.kill()
    output = process.stdout.read().decode()  # ends with the last process that can write there
    assert "stopped from outside by SIGTERM" in output
    left = subprocess.run(["pgrep", "-f", f"output={run_dir}"], capture_output=True, text=True)
    assert not left.stdout, left.stdout
    check_nothing_lost(sft, run_dir, groups)
