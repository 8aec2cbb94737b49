"""Jobs on a real Slurm of two nodes, started here: by nemo-run and by the plain batch script.

Not covered: accounts (they need Slurm's database), a tunnel that stands, containers, GPUs, and
what happens at a time limit.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from megatron_sr1.data.digits import make_digits
from megatron_sr1.observability.metrics import read_lines
from tests.slurm_here import SlurmHere, missing

ROOT = Path(__file__).resolve().parents[2]
LAUNCHER = ROOT / ".venv-launch" / "bin"
JOB_SECONDS = 1500
COLD_START = ["data.prompts_per_step=16", "optimizer.num_steps=2", "optimizer.warmup_steps=0"]
GRPO = ["data.prompts_per_step=6", "algorithm.prompts_per_update=3", "optimizer.num_steps=2"]
GRPO += ["rollout.samples_per_prompt=4", "data.eval=", "checkpoint.every_steps=0"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def slurm():
    reason = missing()
    if reason:
        pytest.skip(reason)
    made = subprocess.run(
        [sys.executable, ROOT / "tools" / "make_env.py", "--launcher"],
        capture_output=True,
        text=True,
        timeout=600,
    )
    if made.returncode:
        pytest.skip(f"the launcher's environment cannot be made: {made.stderr[-300:]}")
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
def chain(slurm, send, tiny_model, cold_start, shards, tmp_path_factory):
    """Cold start, GRPO and evaluation of two tasks each, on two nodes; the jobs after their end."""
    output = tmp_path_factory.mktemp("a chain")  # a path with a space, quoted all the way
    done, jobs = send(
        *("--stages", "sft,grpo,eval", "--output", output, "--partition", "main"),
        *("--nodes", "2", "--tasks-per-node", "1", "data.eval="),
        *(f"sft:{text}" for text in cold_start),
        *(f"grpo:{text}" for text in (f"data.train={shards['train']}", *GRPO)),
        *("eval:data.train=", f"eval:data.eval={shards['eval']}"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    queued = {name: slurm.job(number) for name, number in jobs.items()}
    ended = {name: slurm.wait(number, JOB_SECONDS) for name, number in jobs.items()}
    return output, queued, ended


def numbers(run):
    """Lines of metrics.jsonl without times and memory."""
    lines = read_lines(run / "metrics.jsonl")
    return [
        {k: v for k, v in line.items() if not k.startswith(("time/", "memory/"))} for line in lines
    ]


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
    judged = read_lines(output / "eval" / "eval" / "sampled.jsonl")
    assert [line["index"] for line in judged] == list(range(6))


def test_each_job_of_the_chain_waits_for_the_one_before_and_takes_its_model(chain):
    output, queued, ended = chain
    for name, before in (("grpo", "sft"), ("eval", "grpo")):
        assert queued[name]["JobState"] == "PENDING"
        assert f"afterok:{queued[before]['JobId']}" in queued[name]["Dependency"]
        assert ended[before]["EndTime"] <= ended[name]["StartTime"]
        config = json.loads((output / name / "config.json").read_text())
        assert config["model"]["path"] == f"{output}/{before}/hf"


def test_the_plain_batch_script_gives_the_numbers_of_nemo_runs_job(slurm, chain, shards, tmp_path):
    output, *_ = chain
    done = slurm.run(
        *("sbatch", "--parsable", "--gpus-per-node=0", "--nodes=2", "--ntasks-per-node=1"),
        *("--partition=main", "--time=30", f"--output={tmp_path / 'log'}"),
        *("examples/slurm/train.sbatch", "examples/digits_cpu.yaml", f"output={tmp_path / 'run'}"),
        *(f"model.path={output}/sft/hf", f"data.train={shards['train']}", *GRPO),
        cwd=ROOT,
    )
    job = slurm.wait(done.stdout.strip(), JOB_SECONDS)
    assert job["JobState"] == "COMPLETED", (tmp_path / "log").read_text()[-3000:]
    assert numbers(tmp_path / "run") == numbers(output / "grpo")


def test_torchrun_on_each_node_joins_both(slurm, send, cold_start, tmp_path):
    done, jobs = send(
        *("--stages", "sft", "--output", tmp_path / "run", "--launcher", "torchrun"),
        *("--nodes", "2", "--tasks-per-node", "1", "data.eval=", *cold_start),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert slurm.wait(jobs["sft"], JOB_SECONDS)["JobState"] == "COMPLETED"
    assert [line["step"] for line in read_lines(tmp_path / "run" / "metrics.jsonl")] == [1, 2]


def test_a_failed_job_is_not_started_again_and_takes_its_followers_with_it(
    slurm, send, cold_start, shards, tmp_path
):
    broken = tmp_path / "model"  # passes the checks of a launcher, which reads no weights
    broken.mkdir()
    (broken / "config.json").write_text("{}")
    (broken / "model.safetensors").touch()
    done, jobs = send(
        *("--stages", "sft,grpo", "--output", tmp_path / "run", "data.eval="),
        *(f"sft:{text}" for text in (*cold_start, f"model.path={broken}")),
        f"grpo:data.train={shards['train']}",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = (slurm.wait(jobs[name], JOB_SECONDS) for name in ("sft", "grpo"))
    assert (first["JobState"], first["Restarts"]) == ("FAILED", "0")
    assert (second["JobState"], second["RunTime"]) == ("CANCELLED", "00:00:00")
    log = Path(first["StdOut"]).with_name(f"log-megatron_sr1.sft_{jobs['sft']}_0.out")
    assert "megatron-sr1: error: " in log.read_text()


def test_nemo_run_cancels_what_it_sent(slurm, send, cold_start, tmp_path):
    done, jobs = send(
        *("--stages", "sft", "--output", tmp_path / "run", "--sbatch", "hold="),
        *("data.eval=", *cold_start),
    )
    assert slurm.job(jobs["sft"])["Reason"] == "JobHeldUser", done.stdout
    (cancel,) = [line for line in done.stdout.splitlines() if "cancel --all" in line]
    slurm.run("bash", "-c", f"PATH={LAUNCHER}:$PATH {cancel}")
    assert slurm.job(jobs["sft"])["JobState"] == "CANCELLED"


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--partition", "nope"], "partition 'nope' is not known to this Slurm; it has main"),
        (["--container", "/no/such.sqsh"], "container /no/such.sqsh: no such image file"),
        (["--container", "image:1"], "srun knows no --container-image"),
        (["--python", "/no/python"], "/no/python: no such program"),
        (["--sbatch", "gres=gpu:1"], "Slurm refused the job: sbatch: error: "),
    ],
)
def test_a_wrong_submission_is_one_line_and_queues_nothing(slurm, send, cold_start, flags, says):
    before = slurm.run("squeue", "--noheader", "--format=%i").stdout
    done, jobs = send("--stages", "sft", "data.eval=", *flags, *cold_start)
    assert done.returncode == 2 and not jobs
    (line,) = done.stderr.splitlines()
    assert line.startswith("train_digits: error: ") and says in line
    assert slurm.run("squeue", "--noheader", "--format=%i").stdout == before
