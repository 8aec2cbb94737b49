"""Two ranks save and load while something is wrong, and a run whose disk is full.

Not covered: a failure in the few files that rank 0 writes within Megatron while others wait; its
end ends them (tests/unit/test_failure.py).
"""

import json
import os
import subprocess
from pathlib import Path

import pytest

from megatron_sr1.demo.digits import make_digits
from tests.distributed.test_resume import ROOT, command, numbers

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parent / "ranks" / "checkpoint_faults.py"


@pytest.fixture(scope="module")
def ranks(tiny_model, run_ranks, tmp_path_factory):
    out = tmp_path_factory.mktemp("faults")
    run_ranks(SCRIPT, 2, out, tiny_model)
    return [json.loads((out / f"rank_{rank}.json").read_text()) for rank in (0, 1)]


def test_each_rank_hashes_what_it_wrote(ranks):
    first, second = ranks
    assert second["hashed"] and {n[:4] for n in second["hashed"]} == {"__1_", "rng_"}
    assert not set(first["hashed"]) & set(second["hashed"])
    assert {"common.pt", ".metadata", "rng_0.pt", "state.json"} < set(first["hashed"])


def test_reading_is_shared_out(ranks):
    first, second = (set(r["read"]) for r in ranks)
    assert not first & second and abs(len(first) - len(second)) <= 1
    assert {n for n in first | second if n.endswith(".distcp")} <= first | second


def test_a_rank_that_cannot_write_raises_its_cause_on_all_ranks(ranks):
    first, second = ranks
    assert first["save"] == second["save"] and "step_4 was not saved" in first["save"]
    assert "Worker failure" in first["save"]
    assert first["again"] is second["again"] is None
    assert first["held"] == second["held"] == 4


def test_damage_raises_the_same_error_on_all_ranks(ranks):
    first, second = ranks
    assert first["load"] == second["load"]
    assert "__1_0.distcp: other contents" in first["load"]
    assert "rng_1.pt: missing" in first["load"]
    assert "complete by their sizes: step_2" in first["load"]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own, and a way to make it larger."""
    target = tmp_path / "disk"
    target.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200m", "tmpfs", str(target)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no file system may be mounted here: {done.stderr.strip()}")

    def resize(option):
        again = ["mount", "-o", f"remount,size={option}", str(target)]
        subprocess.run(again, check=True, capture_output=True)

    yield target, resize
    subprocess.run(["umount", str(target)], check=True)


def run(argv, **more):
    return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=500, **more)


def test_a_run_on_a_full_disk_ends_with_the_cause_and_resumes_when_there_is_space(
    tmp_path, tiny_model, small_disk
):
    """Supervised, one rank: room for one checkpoint, then for all."""
    disk, resize = small_disk
    shards = make_digits(tmp_path / "digits", 1, num_train=8, num_eval=8, num_cold_start=48)
    more = ("stage=sft", "launch.num_processes=1", "data.prompts_per_step=20")
    argv = command(disk / "run", tiny_model, {"train": shards["cold_start"]}, *more)
    resize("34m")
    stopped = run([*argv, "checkpoint.keep_last=0"])
    assert stopped.returncode == 2, stopped.stderr[-3000:]
    last = stopped.stderr.strip().splitlines()[-1]
    assert "step_4 was not saved: No space left on device for about" in last
    assert str(disk / "run" / "checkpoints") in last
    folder = disk / "run" / "checkpoints"
    assert sorted(os.listdir(folder)) == ["latest", "step_2"]
    assert (folder / "latest").read_text() == "step_2\n"
    resize("100m")
    again = run([*argv, "checkpoint.keep_last=0"])
    assert again.returncode == 0, again.stderr[-3000:]
    assert "resumed from step 2" in again.stderr
    assert [line["step"] for line in numbers(disk / "run")] == [1, 2, 3, 4]
    assert sorted(os.listdir(folder)) == ["latest", "step_2", "step_4"]


def test_a_changed_model_path_is_refused_on_resuming(tmp_path, tiny_model):
    """Other weights under the same name would be another reference."""
    import shutil

    shards = make_digits(tmp_path / "digits", 1, num_train=8, num_eval=8, num_cold_start=24)
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    more = ("stage=sft", "launch.num_processes=1", "data.prompts_per_step=8")
    argv = command(tmp_path / "run", model, {"train": shards["cold_start"]}, *more)
    done = run([*argv, "optimizer.num_steps=1"])
    assert done.returncode == 0, done.stderr[-3000:]
    weights = model / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-8:] = bytes(8)
    weights.write_bytes(data)
    again = run(argv)
    assert again.returncode == 2
    assert "fingerprint of model.path's weights" in again.stderr
