"""`doctor --distributed` on two gloo ranks. Run as a script, one rank differs.

Not covered: GPUs, NCCL, several machines; clocks that differ are a rank's own `time.time` moved.
"""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

from megatron_sr1 import doctor_distributed
from megatron_sr1.cli import main

SKEW_SECONDS = 7.0


def test_two_ranks_find_that_they_can_train(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "-m", "megatron_sr1", "doctor", "--distributed"]
    run_dir = tmp_path / "new" / "run"
    done = subprocess.run(
        [*command, "--output", str(run_dir)], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("These ranks can train.") == 1
    for words in ("2 on 1 machine", "all-reduce 32 MiB", "GB/s (gloo)", "clocks", "/dev/shm"):
        assert words in done.stdout
    assert f"{run_dir}, seen by all ranks" in done.stdout
    assert list(run_dir.iterdir()) == []


def test_ranks_that_differ_are_reported(run_ranks, tmp_path):
    done = run_ranks(__file__, 2, tmp_path, check=False)
    assert done.returncode != 0
    for words in (
        r"\[ FAIL \] torch +\d.*: rank 0; 2.0.0: rank 1",
        r"\[ warn \] clocks +\+(6999|700\d)\.",
        "-> synchronize the machines' clocks",
        r"\[ FAIL \] run directory +rank 0 does not see files of rank 1; rank 1 does not see files "
        "of rank 0",
        "cannot train together yet: torch, run directory.",
    ):
        assert re.search(words, done.stdout), done.stdout


def test_a_run_directory_that_cannot_be_written_is_reported(groups, tmp_path):
    (tmp_path / "file").touch()
    (finding,) = doctor_distributed._files(tmp_path / "file")
    assert finding.level == "fail" and finding.found.startswith("rank 0: ")


def test_without_a_launch_it_says_how_to_start_one(capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert main(["doctor", "--distributed"]) == 2
    assert "torchrun --nproc-per-node N -m megatron_sr1" in capsys.readouterr().err


def examine_apart(run_dir: Path) -> int:
    """Examine with a second rank of another torch, another clock and another folder."""
    doctor_distributed.VISIBLE_SECONDS = 1.0
    if os.environ["RANK"] == "1":
        known, now = doctor_distributed.version, time.time
        doctor_distributed.version = lambda name: "2.0.0" if name == "torch" else known(name)
        time.time = lambda: now() + SKEW_SECONDS
        run_dir = run_dir / "elsewhere"
    text, can_train = doctor_distributed.examine_together(run_dir)
    if os.environ["RANK"] == "0":
        print(text)
    return 0 if can_train else 1


if __name__ == "__main__":
    sys.exit(examine_apart(Path(sys.argv[1])))
