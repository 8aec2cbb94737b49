"""Jobs on a real Slurm of two nodes, started here: by nemo-run and by the plain batch script.

Slurm looks at time limits every 30 s, longer than these runs: the one that is to be warned is held
after its first steps (SIGSTOP, as a file system that hangs would), gets too short a limit then, and
goes on with Slurm's warning, which wakes it. So no machine is too fast or too slow for it.

Not covered: accounts (test_slurm_accounts.py), a tunnel that stands, containers, GPUs, and
preemption by another job.
"""

import functools
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from megatron_sr1.demo.digits import make_digits
from megatron_sr1.observability.metrics import read_lines
from tests.slurm_here import SlurmHere, missing

ROOT = Path(__file__).resolve().parents[2]
LAUNCHER = ROOT / ".venv-launch" / "bin"
JOB_SECONDS = 1500
COLD_START = ["data.prompts_per_step=16", "optimizer.num_steps=2", "optimizer.warmup_steps=0"]
GRPO = ["data.prompts_per_step=6", "algorithm.prompts_per_update=3"]
GRPO += ["rollout.samples_per_prompt=4", "evaluation.sets=", "checkpoint.every_steps=0"]
NUM_STEPS = 8
MANY = ["optimizer.num_steps=60", "checkpoint.every_steps=0"]
TWO_TASKS = ["--nodes", "2", "--tasks-per-node", "1"]
WARNING_SECONDS = 1500
LONG_MINUTES, SHORT_MINUTES = 60, 25
"""Limits: Slurm warns 30 s before it must, so after 34 minutes, and at its next look, in 30 s."""


@pytest.fixture(scope="module")
def slurm():
    reason = missing()
    if reason:
        pytest.skip(reason)
    made = subprocess.run(
        [sys.executable, ROOT / "tools" / "make_launch_env.py"],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert made.returncode == 0, f"the launcher's environment cannot be made: {made.stderr}"
    with tempfile.TemporaryDirectory(prefix="slurm_") as folder:
        service = SlurmHere(Path(folder))
        try:
            service.start()
            yield service
        finally:
            service.stop()


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    return make_digits(folder, 1, num_train=24, num_eval=6, num_cold_start=32)


@pytest.fixture(scope="module")
def cold_start(tiny_model, shards):
    """Overrides of a short supervised run."""
    return [f"model.path={tiny_model}", f"data.train={shards['cold_start']}", *COLD_START]


@pytest.fixture(scope="module")
def send(slurm, tmp_path_factory):
    """Run the example's launch script; returns what it did and the jobs' numbers by name."""
    logs = tmp_path_factory.mktemp("logs")

    def run(*arguments):
        script = ROOT / "examples" / "slurm" / "train_digits.py"
        argv = [LAUNCHER / "python", script, "--logs", logs, *arguments]
        done = slurm.run(*map(str, argv), check=False, cwd=ROOT)
        told = [line.split() for line in done.stdout.splitlines() if " is job " in line]
        return done, {words[1]: words[-1] for words in told}

    return run


@pytest.fixture(scope="module")
def grpo(tiny_model, shards):
    """Overrides of a run of GRPO."""
    steps = f"optimizer.num_steps={NUM_STEPS}"
    return [f"model.path={tiny_model}", f"data.train={shards['train']}", *GRPO, steps]


@pytest.fixture(scope="module")
def queue_plain(slurm, grpo, tmp_path_factory):
    """Queue GRPO of two tasks by the plain batch script, once; its folder and job."""

    @functools.cache
    def queue():
        folder = tmp_path_factory.mktemp("plain")
        return folder, send_plain(slurm, folder, *grpo)

    return queue


@pytest.fixture(scope="module")
def chain(slurm, send, tiny_model, cold_start, shards, tmp_path_factory):
    """Cold start, GRPO and evaluation of two tasks each, on two nodes; the jobs after their end."""
    output = tmp_path_factory.mktemp("chain")
    done, jobs = send(
        *("--stages", "sft,grpo,eval", "--output", output, "--partition", "main"),
        *(*TWO_TASKS, "evaluation.sets="),
        *(f"sft:{text}" for text in cold_start),
        *(f"grpo:{text}" for text in (f"data.train={shards['train']}", *GRPO)),
        "grpo:optimizer.num_steps=2",
        *("eval:data.train=", f"eval:evaluation.sets.greedy.path={shards['eval']}"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    queued = {name: slurm.job(number) for name, number in jobs.items()}
    ended = {name: slurm.wait(number, JOB_SECONDS) for name, number in jobs.items()}
    return output, queued, ended


def send_plain(slurm, folder, *overrides):
    """Submit the batch script with two tasks, its run and log in a folder; the job's number."""
    done = slurm.run(
        *("sbatch", "--parsable", "--gpus-per-node=0", "--nodes=2", "--ntasks-per-node=1"),
        *("--partition=main", "--time=30", f"--output={folder / 'log'}"),
        *("examples/slurm/train.sbatch", "examples/digits_cpu.yaml", f"output={folder / 'run'}"),
        *overrides,
        cwd=ROOT,
    )
    return done.stdout.strip()


def ranks_of(number):
    """Processes of a job's tasks."""
    found = []
    for process in psutil.process_iter():
        try:
            is_task = process.environ().get("SLURM_JOB_ID") == number and (
                process.parent().name() == "slurmstepd" and "megatron_sr1" in process.cmdline()
            )
        except (psutil.Error, AttributeError):  # it ended while it was looked at
            continue
        found += [process] if is_task else []
    return found


def is_written(file, seconds):
    """Whether a file is there, looked for so often that the answer is hardly older than it."""
    until = time.monotonic() + seconds
    while not file.exists() and time.monotonic() < until:
        time.sleep(0.01)
    return file.exists()


def hold(slurm, number, metrics):
    """Stop the ranks of a job after its first steps."""
    slurm.wait_until(number, JOB_SECONDS, lambda job: is_written(metrics, 2.0))
    ranks = ranks_of(number)
    for process in ranks:
        process.suspend()
    assert len(ranks) == 2 and len(read_lines(metrics)) < NUM_STEPS


def warn(slurm, number):
    """Give a held job too short a limit until Slurm has warned it, which wakes its ranks."""
    ranks, until = ranks_of(number), time.monotonic() + 120
    slurm.run("scontrol", "update", f"JobId={number}", f"TimeLimit={SHORT_MINUTES}")
    while any(p.is_running() and p.status() == psutil.STATUS_STOPPED for p in ranks):
        assert time.monotonic() < until, "no warning"
        time.sleep(0.1)
    slurm.run("scontrol", "update", f"JobId={number}", f"TimeLimit={LONG_MINUTES}")


def logs_of(job, stage):
    """Where the ranks' words go: files of the job's first start and of its second."""
    name = f"log-megatron_sr1.{stage}_{job['JobId']}_{{}}.out"
    return [Path(job["StdOut"]).with_name(name.format(start)) for start in range(2)]


def numbers(run):
    """Lines of metrics.jsonl without times and memory."""
    lines = read_lines(run / "metrics.jsonl")
    return [
        {k: v for k, v in line.items() if not k.startswith(("time/", "memory/", "perf/"))}
        for line in lines
    ]


def test_a_run_warned_of_its_time_limit_saves_is_queued_again_and_ends_with_the_same_numbers(
    slurm, send, queue_plain, grpo, tmp_path
):
    output = tmp_path / "a run"  # a path with a space, quoted all the way
    done, jobs = send(
        *("--partition", "main", *TWO_TASKS, "--output", output, *grpo),
        *("--time", str(LONG_MINUTES), "--warning", str(WARNING_SECONDS)),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (number,) = jobs.values()
    first_log = logs_of(slurm.job(number), "grpo")[0]
    hold(slurm, number, output / "metrics.jsonl")
    plain, other = queue_plain()  # it runs while this one waits
    warn(slurm, number)
    again = slurm.wait_until(
        number,
        JOB_SECONDS,  # counted as started again while its nodes are still being cleared
        lambda job: job["Restarts"] == "1" and job["JobState"] != "COMPLETING",
    )
    saved = re.search(rf"stop requested: saved step (\d+) of {NUM_STEPS}", first_log.read_text())
    assert saved and 1 <= int(saved[1]) < NUM_STEPS
    assert len(read_lines(output / "metrics.jsonl")) == int(saved[1])
    assert not (output / "hf").exists()
    assert again["JobState"] == "PENDING"
    job = slurm.wait(number, JOB_SECONDS)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1")
    assert f"resumed from step {saved[1]} in " in logs_of(job, "grpo")[1].read_text()
    assert (output / "hf" / "model.safetensors").is_file()
    slurm.wait(other, JOB_SECONDS)
    assert numbers(output) == numbers(plain / "run")


def test_the_plain_batch_script_runs_grpo_on_two_nodes(slurm, queue_plain):
    folder, number = queue_plain()
    job = slurm.wait(number, JOB_SECONDS)
    assert job["JobState"] == "COMPLETED", (folder / "log").read_text()[-3000:]
    assert (job["NumTasks"], job["NumNodes"], job["Restarts"]) == ("2", "2", "0")
    lines = read_lines(folder / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, NUM_STEPS + 1))
    for line in lines:
        assert line["stage"] == "grpo" and line["time/pass1_seconds"] > 0
        assert 0 < line["mismatch/abs_max"] < 1e-3


def test_a_failed_job_is_not_started_again_and_takes_its_followers_with_it(
    slurm, send, cold_start, shards, tmp_path
):
    broken = tmp_path / "model"  # passes the checks of a launcher, which reads no weights
    broken.mkdir()
    (broken / "config.json").write_text("{}")
    (broken / "model.safetensors").touch()
    done, jobs = send(
        *("--stages", "sft,grpo", "--output", tmp_path / "run", "evaluation.sets="),
        *(f"sft:{text}" for text in (*cold_start, f"model.path={broken}")),
        f"grpo:data.train={shards['train']}",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = (slurm.wait(jobs[name], JOB_SECONDS) for name in ("sft", "grpo"))
    assert (first["JobState"], first["Restarts"]) == ("FAILED", "0")
    assert second["JobState"] == "CANCELLED"
    assert second["NodeList"] in ("", "(null)")  # never started
    assert "megatron-sr1: error: " in logs_of(first, "sft")[0].read_text()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--partition", "nope"], "partition 'nope' is not known to this Slurm; it has main"),
        (["--container", "/no/such.sqsh"], "container /no/such.sqsh: no such image file"),
        (["--container", "image:1"], "srun knows no --container-image"),
        (["--python", "/no/python"], "/no/python: no such program"),
        (["data.train=/no/shards"], "data.train=/no/shards: no such directory"),
        (["--sbatch", "gres=gpu:1"], "Slurm refused the job: sbatch: error: "),
    ],
)
def test_a_wrong_submission_is_one_line_and_queues_nothing(slurm, send, cold_start, flags, says):
    before = slurm.run("squeue", "--noheader", "--format=%i").stdout
    done, jobs = send("--stages", "sft", "evaluation.sets=", *cold_start, *flags)
    assert done.returncode == 2 and not jobs
    (line,) = done.stderr.splitlines()
    assert line.startswith("train_digits: error: ") and says in line
    assert slurm.run("squeue", "--noheader", "--format=%i").stdout == before


@pytest.mark.slow
def test_a_chain_sent_by_nemo_run_finishes_and_its_metrics_are_there(chain):
    output, _, ended = chain
    assert {name: job["JobState"] for name, job in ended.items()} == dict.fromkeys(
        ("sft", "grpo", "eval"), "COMPLETED"
    )
    assert {(job["NumTasks"], job["NumNodes"]) for job in ended.values()} == {("2", "2")}
    assert [line["step"] for line in read_lines(output / "sft" / "metrics.jsonl")] == [1, 2]
    lines = read_lines(output / "grpo" / "metrics.jsonl")
    assert [(line["stage"], line["step"]) for line in lines] == [("grpo", 1), ("grpo", 2)]
    for line in lines:
        assert 0 < line["mismatch/abs_max"] < 1e-3 and line["time/pass1_seconds"] > 0
    judged = read_lines(output / "eval" / "eval" / "greedy.jsonl")
    assert [line["index"] for line in judged] == list(range(6))


@pytest.mark.slow
def test_each_job_of_the_chain_waits_for_the_one_before_and_takes_its_model(chain):
    output, queued, ended = chain
    for name, before in (("grpo", "sft"), ("eval", "grpo")):
        assert queued[name]["JobState"] == "PENDING"
        assert f"afterok:{queued[before]['JobId']}" in queued[name]["Dependency"]
        assert ended[before]["EndTime"] <= ended[name]["StartTime"]
        config = json.loads((output / name / "config.json").read_text())
        assert config["model"]["path"] == f"{output}/{before}/hf"


def check_warned(slurm, number, output):
    """A job of `MANY` steps that is warned in the midst of them ends after a second start."""
    slurm.wait_until(number, JOB_SECONDS, lambda job: (output / "metrics.jsonl").exists())
    slurm.run("scancel", "--signal=USR1", number)  # what Slurm does when a limit nears
    job = slurm.wait(number, JOB_SECONDS)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1")
    assert [line["step"] for line in read_lines(output / "metrics.jsonl")] == list(range(1, 61))


@pytest.mark.slow
def test_the_plain_batch_script_has_a_warned_run_queued_again(slurm, cold_start, tmp_path):
    number = send_plain(slurm, tmp_path, "stage=sft", "evaluation.sets=", *cold_start, *MANY)
    check_warned(slurm, number, tmp_path / "run")
    log = (tmp_path / "log").read_text()  # of both starts
    assert "stop requested: saved step " in log and "resumed from step " in log


@pytest.mark.slow
def test_torchrun_on_each_node_joins_both_and_lives_through_a_warning(
    slurm, send, cold_start, tmp_path
):
    done, jobs = send(
        *("--stages", "sft", "--output", tmp_path / "run", "--launcher", "torchrun"),
        *(*TWO_TASKS, "evaluation.sets=", *cold_start, *MANY),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    check_warned(slurm, jobs["sft"], tmp_path / "run")


@pytest.mark.slow
def test_nemo_run_cancels_what_it_sent(slurm, send, cold_start, tmp_path):
    done, jobs = send(
        *("--stages", "sft", "--output", tmp_path / "run", "--sbatch", "hold="),
        *("evaluation.sets=", *cold_start),
    )
    assert slurm.job(jobs["sft"])["Reason"] == "JobHeldUser", done.stdout
    (cancel,) = [line for line in done.stdout.splitlines() if "cancel --all" in line]
    slurm.run("bash", "-c", cancel)
    assert slurm.job(jobs["sft"])["JobState"] == "CANCELLED"
