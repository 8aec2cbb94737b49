"""The demo's GRPO stage, killed ten times and started again, gives what it gives undisturbed.

The reference is the demo's own run of the stage, in one process with the other stages and without
checkpoints on the way: so this shows too that neither changes a number. Not covered: a machine
that loses what it had not written to the disk yet, and a kill on another host.
"""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megatron_sr1.demo.demo import WAYS
from megatron_sr1.observability.metrics import read_lines

ROOT = Path(__file__).resolve().parents[2]
EVERY_STEPS = 4
ALL, RANK_0, RANK_1 = "all", "0", "1"
MOMENTS = (
    ("start", 0.0, ALL),
    ("start", 0.5, RANK_1),
    ("pass 1", 5, ALL),
    ("update", 9, ALL),
    ("save", 12, ALL),
    ("pass 1", 18, RANK_0),
    ("save", 20, ALL),
    ("update", 27, RANK_1),
    ("any", 34, ALL),
    ("export", 40, ALL),
)
"""What a kill aims at, where (a step, or a share of the start-up), and which processes it ends."""


class Stage:
    """One start of the stage.

    Args:
        config: the demo's configuration of it.
        output: run directory.
        log: where its words go.
    """

    def __init__(self, config, output, log):
        command = [sys.executable, "-m", "megatron_sr1", "train", str(config)]
        command += [f"output={output}", f"checkpoint.every_steps={EVERY_STEPS}"]
        self.output, self.log = output, log
        with open(log, "w") as file:
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file)
        self.tree = psutil.Process(self.process.pid)

    def wait_for(self, what, seconds=600):
        """Until `what()` is true; it must not end before."""
        until = time.monotonic() + seconds
        while not what():
            assert self.process.poll() is None, self.log.read_text()[-4000:]
            assert time.monotonic() < until, self.log.read_text()[-4000:]
            time.sleep(0.002)

    def steps_done(self):
        return max((line["step"] for line in read_lines(self.output / "metrics.jsonl")), default=0)

    def rank(self, number):
        """The process of a rank, None before it is there."""
        for process in self.tree.children(recursive=True):
            try:
                mine, parents = process.environ(), process.parent().environ()
            except (psutil.Error, AttributeError):
                continue
            if mine.get("RANK") == number and "RANK" not in parents:
                return process
        return None

    def kill(self, who):
        """SIGKILL for all processes at once, as a machine that fails, or for one rank alone."""
        everyone = [self.tree, *self.tree.children(recursive=True)]
        if who == ALL:
            for process in everyone:
                process.send_signal(signal.SIGKILL)
            self.process.wait()
        else:
            self.wait_for(lambda: self.rank(who) is not None)
            self.rank(who).send_signal(signal.SIGKILL)
            assert self.process.wait(timeout=60) not in (0, 2), "the launcher missed it"
        _, alive = psutil.wait_procs(everyone, timeout=60)
        assert not alive, f"still there after the kill: {alive}"


def aim(stage, target, where, seconds, draw):
    """Wait for the moment of a kill; `seconds` are the reference's, by phase."""
    checkpoints, until_pass1 = stage.output / "checkpoints", seconds("sync") + seconds("prompts")
    if target == "start":
        time.sleep(12 * (where + draw.random() / 2))
    elif target == "save":
        stage.wait_for((checkpoints / f".step_{where}.partial").exists)
        time.sleep(0.3 * draw.random())
    elif target == "export":
        stage.wait_for(lambda: any(stage.output.glob("*hf*")))
    else:
        stage.wait_for(lambda: stage.steps_done() >= where)
        before = {"pass 1": until_pass1, "update": seconds("step") - seconds("update"), "any": 0.0}
        length = {"pass 1": seconds("pass1"), "update": seconds("update"), "any": seconds("step")}
        time.sleep(before[target] + draw.random() * length[target])


def numbers(run_dir):
    """Lines of metrics.jsonl without times and memory, and the rates that the demo writes later."""
    return [
        {
            key: value
            for key, value in line.items()
            if not key.startswith(("time/", "memory/", "perf/", "evaluation/"))
        }
        for line in read_lines(run_dir / "metrics.jsonl")
    ]


@pytest.fixture(scope="module")
def killed(demo, tmp_path_factory):
    """Run directory of the stage, killed at every moment in turn and then left alone."""
    folder, draw = tmp_path_factory.mktemp("kills"), random.Random(20)
    output, config = folder / "run", demo / "vision_sr1" / "config.json"
    usual = read_lines(demo / "vision_sr1" / "metrics.jsonl")[21]
    for number, (target, where, who) in enumerate(MOMENTS):
        stage = Stage(config, output, folder / f"start_{number}.log")
        aim(stage, target, where, lambda name: usual[f"time/{name}_seconds"], draw)
        done = stage.steps_done()
        stage.kill(who)
        print(f"{target} {where}, {who}: killed after step {done}")
        if who != ALL and target != "start":
            last = stage.log.read_text().splitlines()[-4:]
            assert any(f"rank {who}: its process is gone" in line for line in last), last
    stage = Stage(config, output, folder / "last.log")
    assert stage.process.wait(timeout=900) == 0, stage.log.read_text()[-4000:]
    assert "resumed from step 40" in stage.log.read_text()
    return output


@pytest.mark.slow
def test_every_step_is_told_once_with_the_same_numbers(demo, killed):
    expected = numbers(demo / "vision_sr1")
    assert [line["step"] for line in expected] == list(range(41))  # 0: evaluated at the start
    assert numbers(killed) == expected


@pytest.mark.slow
def test_every_rollout_is_the_same(demo, killed):
    names = sorted(path.name for path in (demo / "vision_sr1" / "rollouts").iterdir())
    assert len(names) == 40
    assert sorted(path.name for path in (killed / "rollouts").iterdir()) == names
    for name in names:
        expected = (demo / "vision_sr1" / "rollouts" / name).read_bytes()
        assert (killed / "rollouts" / name).read_bytes() == expected, name


@pytest.mark.slow
def test_the_exported_model_is_the_same_to_the_last_bit(demo, killed):
    expected = sorted((demo / "vision_sr1" / "hf").iterdir())
    assert [path.name for path in sorted((killed / "hf").iterdir())] == [p.name for p in expected]
    for path in expected:
        assert (killed / "hf" / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.slow
def test_the_evaluation_is_the_same(demo, killed):
    whole = demo / "vision_sr1"
    found = json.loads((killed / "summary.json").read_text())
    assert found == json.loads((whole / "summary.json").read_text())
    assert all(found[way]["ungraded"] == found[way]["skipped"] == 0 for way in WAYS)
    names = sorted(path.name for path in (whole / "eval").glob("*.jsonl"))
    assert sorted(path.name for path in (killed / "eval").glob("*.jsonl")) == names
    assert len(names) == 5 * len(WAYS)
    for name in names:
        expected = (whole / "eval" / name).read_bytes()
        assert (killed / "eval" / name).read_bytes() == expected, name
