"""The profiler's window and file, and host memory that goes back to the system."""

import gzip
import json

import psutil
import pytest
import torch

from megatron_sr1.config.loading import load_config
from megatron_sr1.errors import ConfigError
from megatron_sr1.observability.profiling import StepProfiler, trim_host_memory
from megatron_sr1.trainer.context import Context

BLOCK_BYTES, NUM_BLOCKS, LIVING = 4096, 30_000, 100


def run_steps(profiler: StepProfiler, done: int, num_steps: int) -> None:
    """As Context does: begin before a step, end after it."""
    profiler.begin(done + 1)
    for step in range(done + 1, num_steps + 1):
        with torch.profiler.record_function(f"step {step}"):
            torch.ones(4).sum()
        profiler.end(step)
        profiler.begin(step + 1)


@pytest.mark.parametrize(
    ("window", "done", "num_steps", "name", "recorded"),
    [
        ([2, 3], 0, 5, "rank_1_steps_2_3.json.gz", {2, 3}),
        ([1, 1], 0, 5, "rank_1_steps_1_1.json.gz", {1}),
        ([2, 4], 2, 5, "rank_1_steps_3_4.json.gz", {3, 4}),  # resumed in the window
        ([4, 9], 0, 5, "rank_1_steps_4_5.json.gz", {4, 5}),  # the run ends in the window
    ],
)
def test_the_file_holds_the_steps_of_the_window(tmp_path, window, done, num_steps, name, recorded):
    run_steps(StepProfiler(window, num_steps, tmp_path, 1), done, num_steps)
    assert [p.name for p in tmp_path.rglob("*.gz")] == [name]
    events = json.loads(gzip.open(tmp_path / "profile" / name).read())["traceEvents"]
    named = {event["name"] for event in events if event.get("name", "").startswith("step ")}
    assert named == {f"step {step}" for step in recorded}
    assert any(event.get("name") == "aten::sum" for event in events)


@pytest.mark.parametrize(("window", "done"), [([], 0), ([1, 2], 2)])
def test_outside_of_the_window_nothing_is_written(tmp_path, window, done):
    run_steps(StepProfiler(window, 4, tmp_path, 0), done, 4)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("[3]", "expected .first, last."),
        ("[0,2]", "each 1 or more"),
        ("[3,2]", "expected"),
        ("[8,9]", "begins after the last step, optimizer.num_steps=5"),
    ],
)
def test_an_impossible_window_is_refused(value, message):
    with pytest.raises(ConfigError, match=f"logging.profile_steps.*{message}"):
        load_config(
            None, ["model.path=m", "optimizer.num_steps=5", f"logging.profile_steps={value}"]
        )


def test_phases_stand_in_the_profile_of_the_ranks_that_record(groups, tmp_path):
    for ranks, expected in (("[0]", 1), ("[1]", 0)):
        folder = tmp_path / ranks
        settings = ["model.path=m", f"output={folder}", "logging.profile_steps=[1,1]"]
        config = load_config(None, [*settings, f"logging.profile_ranks={ranks}"])
        context = Context(config, groups, 0)
        context._profiler.begin(1)
        with context.phase("pass1"):
            torch.ones(4).sum()
        path = context._profiler.end(1)
        assert len(list(folder.rglob("*.gz"))) == expected
        if path is not None:
            assert b'"pass1"' in gzip.open(path).read()


def test_free_pages_between_live_blocks_are_returned_to_the_system():
    resident = psutil.Process().memory_info
    blocks = [bytearray(BLOCK_BYTES) for _ in range(NUM_BLOCKS)]
    living = blocks[::LIVING] + blocks[-1:]
    del blocks
    held = resident().rss
    trim_host_memory()
    assert held - resident().rss > 0.5 * BLOCK_BYTES * NUM_BLOCKS
    assert len(living) == NUM_BLOCKS // LIVING + 1
