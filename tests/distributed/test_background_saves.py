"""Saves in the background on two ranks, and through the command.

Writers are held at a gate, a file: what comes before what does not depend on speed.
"""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from megatron_sr1.checkpoint.disk import read_manifest
from megatron_sr1.checkpoint.folders import steps
from megatron_sr1.demo.digits import make_digits
from tests.distributed.test_resume import command, numbers, run_to_the_end

pytestmark = pytest.mark.slow  # unit/test_checkpoint_background.py has the quick ones

SCRIPT = Path(__file__).parent / "ranks" / "background_saves.py"
ROOT = Path(__file__).resolve().parents[2]
NAMED_BY_TIME = {".metadata"}  # it holds a name that each writing makes up


def digests(folder):
    found = {name: file.digest for name, file in read_manifest(folder).items()}
    return {name: digest for name, digest in found.items() if name not in NAMED_BY_TIME}


@pytest.fixture(scope="module")
def seen(tiny_model, run_ranks, tmp_path_factory):
    out = tmp_path_factory.mktemp("background")
    run_ranks(SCRIPT, 2, out, tiny_model)
    return out, [json.loads((out / f"rank_{rank}.json").read_text()) for rank in (0, 1)]


def test_updates_go_on_while_a_rank_writes_and_nothing_is_seen_until_it_has_written(seen):
    for rank, told in enumerate(seen[1]):
        assert len(told["trained"]) == 2 and told["before"] == [] and told["after"] == [1]
        assert told["done"] is (rank == 0), "rank 1's writer was not held, or rank 0's was"


def test_it_equals_a_plain_save_bit_for_bit_and_resumes(seen):
    out, ranks = seen
    plain, background = (digests(out / way / "step_1") for way in ("plain", "background"))
    assert {"__0_0.distcp", "__1_0.distcp", "rng_1.pt"} < set(plain)
    assert background == plain
    for told in ranks:
        assert told["again"] == told["trained"]


def test_a_rank_whose_writer_is_killed_ends_the_save_on_all_and_leaves_the_one_before(seen):
    _, ranks = seen
    assert ranks[0]["told"] == ranks[1]["told"]
    assert "step_2 was not saved" in ranks[0]["told"] and "ended by signal 9" in ranks[0]["told"]
    assert ranks[0]["left"] == ["latest", "step_1"]


def test_a_run_killed_during_a_save_resumes_with_the_numbers_of_plain_saves(tmp_path, tiny_model):
    """Three times, as soon as a save has begun; each time the checkpoint before is whole."""
    data = make_digits(tmp_path / "digits", 1, num_train=1, num_eval=1, num_cold_start=48)
    shards = {"train": data["cold_start"]}
    more = ("stage=sft", "data.prompts_per_step=20", "optimizer.num_steps=8")
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run_to_the_end(command(whole, tiny_model, shards, *more))
    argv = command(stopped, tiny_model, shards, *more, "checkpoint.asynchronous=true")
    for step in (2, 4, 6):
        run = subprocess.Popen(argv, cwd=ROOT, start_new_session=True, stderr=subprocess.DEVNULL)
        partial, until = stopped / "checkpoints" / f".step_{step}.partial", time.monotonic() + 400
        while not partial.exists():
            assert run.poll() is None and time.monotonic() < until
            time.sleep(0.002)
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
        assert step not in steps(partial.parent), "it was quicker than the kill"
        assert (partial.parent / "latest").exists() == (step > 2)
    run_to_the_end(argv)
    assert numbers(stopped) == numbers(whole)
    last = [digests(output / "checkpoints" / "step_8") for output in (whole, stopped)]
    assert last[0] == last[1]
