"""Accounts, on a real Slurm with its database: a wrong one is reported before a job is queued."""

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from megatron_sr1.demo.digits import make_digits
from tests.slurm_accounts import SlurmWithAccounts, unpack
from tests.slurm_here import missing

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    packages = tmp_path_factory.mktemp("packages")
    reason = missing() or unpack(packages)
    if reason:
        pytest.skip(reason)
    subprocess.run([sys.executable, ROOT / "tools" / "make_launch_env.py"], check=True, timeout=600)
    with tempfile.TemporaryDirectory(prefix="slurm_") as folder:
        service = SlurmWithAccounts(Path(folder), packages / "root")
        try:
            service.start()
            yield service
        finally:
            service.stop()


@pytest.fixture
def send(slurm, tiny_model, tmp_path):
    """Send a job that is held, under an account."""
    shards = make_digits(tmp_path / "data", 1, num_train=1, num_eval=1, num_cold_start=8)

    def run(account):
        argv = [ROOT / ".venv-launch" / "bin" / "python", ROOT / "examples/slurm/train_digits.py"]
        argv += ["--logs", tmp_path / "logs", "--stages", "sft", "--sbatch", "hold="]
        argv += ["--account", account, "evaluation.sets=", f"output={tmp_path / 'run'}"]
        argv += [f"model.path={tiny_model}", f"data.train={shards['cold_start']}"]
        return slurm.run(*map(str, argv), check=False, cwd=ROOT)

    return run


def queued(slurm):
    """Accounts of the jobs in the queue."""
    return slurm.run("squeue", "--noheader", "--format=%a").stdout.split()


def test_a_wrong_account_is_one_line_and_queues_nothing(slurm, send):
    done = send("nobody")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line == (
        "train_digits: error: account 'nobody' is not yours in this Slurm; yours are lab, root"
    )
    assert queued(slurm) == []


def test_ones_own_account_is_asked_for(slurm, send):
    done = send("lab")
    assert done.returncode == 0, done.stdout + done.stderr
    assert queued(slurm) == ["lab"]
