"""A save in the background: the state at its start, visible when complete, limited in number.

Writing processes are held at a gate, a file that a test makes, so that what comes before what does
not depend on how fast a machine is. Not covered here: several ranks (tests/distributed/
test_background_saves.py), and the copies from a GPU.
"""

import gc
import os
import resource
import shutil
import signal
import threading
import time

import psutil
import pytest
from megatron.core.dist_checkpointing.strategies import filesystem_async

from megatron_sr1.checkpoint import tensors
from megatron_sr1.checkpoint.disk import read_manifest
from megatron_sr1.checkpoint.folders import LATEST, latest_step, steps
from megatron_sr1.checkpoint.saving import SaveQueue, begin_save
from megatron_sr1.config.loading import load_config
from megatron_sr1.config.training import CheckpointConfig
from megatron_sr1.errors import CheckpointError
from megatron_sr1.runtime import signals
from megatron_sr1.trainer.context import Context
from tests.checkpoint_run import fill, held, load, make_run, save


@pytest.fixture(scope="module")
def actor(tiny_model, groups):
    return make_run(tiny_model, groups)


@pytest.fixture
def gate(tmp_path, monkeypatch):
    """Directory in which a file `step_N` lets the writer of that step finish."""
    folder, measure = tmp_path / "gate", tensors.measure
    folder.mkdir()

    def measure_after_the_gate(path):
        name = path.parent.name.removeprefix(".").removesuffix(".partial")
        while folder.exists() and not (folder / name).exists():
            time.sleep(0.01)
        return measure(path)

    monkeypatch.setattr(tensors, "measure", measure_after_the_gate)
    yield folder
    shutil.rmtree(folder)  # releases writers that a failed test has left waiting


def begin(actor, groups, folder, step):
    return begin_save(folder, step, actor.trained, {"n": step}, in_background=True)


def tensors_of(folder):
    """Digests of all files but those that hold a time of writing or the step."""
    digests = {name: file.digest for name, file in read_manifest(folder).items()}
    return {n: d for n, d in digests.items() if n not in (".metadata", "state.json")}


def test_the_writer_collects_no_garbage_of_the_rank(actor, groups, tmp_path, monkeypatch):
    """The rank's garbage may hold CUDA objects, and a forked process has no CUDA context."""
    ends_with, measure = tensors.end_with, tensors.measure

    def note(when):
        (tmp_path / when).write_text(str(gc.isenabled()))

    monkeypatch.setattr(tensors, "end_with", lambda parent: (note("first"), ends_with(parent)))
    monkeypatch.setattr(tensors, "measure", lambda path: (note("last"), measure(path))[1])
    assert gc.isenabled()
    begin(actor, groups, tmp_path / "checkpoints", 1).finish()
    assert gc.isenabled()
    for when in ("first", "last"):
        assert (tmp_path / when).read_text() == "False", when


def test_a_background_save_equals_a_plain_one_whatever_changes_after_its_start(
    actor, groups, tmp_path, gate
):
    """Bitwise, all files of model, optimizer and generators; weights change while it writes."""
    folder = tmp_path / "checkpoints"
    fill(actor, 2)
    save(actor, groups, tmp_path / "plain", 2)
    pending = begin(actor, groups, folder, 2)
    fill(actor, 3)
    for state in actor.optimizer.chained_optimizers[0].optimizer.state.values():
        state["exp_avg"].fill_(7)
    assert not pending.tensors.is_done, "the writer did not wait at the gate"
    assert steps(folder) == [] and not (folder / LATEST).exists()
    (gate / "step_2").touch()
    pending.finish()
    assert pending.target == folder / "step_2"
    assert latest_step(folder) == 2
    assert tensors_of(folder / "step_2") == tensors_of(tmp_path / "plain" / "step_2")
    assert {"rng_0.pt", "__0_0.distcp"} <= set(tensors_of(folder / "step_2"))
    load(actor, groups, folder)
    assert held(actor) == 2


def test_a_save_leaves_no_process(actor, groups, tmp_path):
    before = set(psutil.Process().children(recursive=True))
    save(actor, groups, tmp_path / "checkpoints", 1)
    begin(actor, groups, tmp_path / "checkpoints", 2).finish()
    assert not set(psutil.Process().children(recursive=True)) - before


def test_only_so_many_are_written_at_once_and_they_appear_in_order(actor, groups, tmp_path, gate):
    """The third waits for the first; the second is written before it and does not overtake it."""
    folder = tmp_path / "checkpoints"
    settings = CheckpointConfig(keep_last=0, asynchronous=True, max_in_flight=2)
    queue = SaveQueue(folder, settings)
    for step in (1, 2):
        fill(actor, step)
        queue.add(step, actor.trained, {"n": step}, None)
    assert len(queue) == 2 and queue.is_writing and steps(folder) == []
    assert sorted(p.name for p in folder.glob(".*")) == [".step_1.partial", ".step_2.partial"]
    (gate / "step_2").touch()
    opener = threading.Timer(1.0, (gate / "step_1").touch)
    opener.start()
    fill(actor, 3)
    assert not (gate / "step_1").exists()
    queue.add(3, actor.trained, {"n": 3}, None)
    opener.join()
    assert len(queue) == 2 and steps(folder) == [1]
    (gate / "step_3").touch()
    queue.finish_all()
    assert len(queue) == 0 and latest_step(folder) == 3
    for step in (1, 2, 3):
        (folder / LATEST).write_text(f"step_{step}\n")
        assert load(actor, groups, folder) == {"n": step} and held(actor) == step


def test_a_writer_that_is_killed_ends_the_save_and_leaves_the_one_before(
    actor, groups, tmp_path, gate
):
    folder = tmp_path / "checkpoints"
    fill(actor, 1)
    save(actor, groups, folder, 1)
    fill(actor, 2)
    pending = begin(actor, groups, folder, 2)
    os.kill(pending.tensors._process.pid, signal.SIGKILL)
    with pytest.raises(CheckpointError, match=r"step_2 was not saved: .*ended by signal 9"):
        pending.finish()
    assert sorted(p.name for p in folder.iterdir()) == ["latest", "step_1"]
    load(actor, groups, folder)
    assert held(actor) == 1


@pytest.mark.skipif(
    not hasattr(filesystem_async, "_get_write_results_queue"),
    reason="this Megatron-Core writes in threads",
)
def test_what_a_killed_writer_has_started_ends_with_it_and_so_does_the_save(
    actor, groups, tmp_path, monkeypatch
):
    """Megatron's writer starts others, which hold its pipe and may wait for it for ever."""
    write, there, gate = filesystem_async._write_item, tmp_path / "there", tmp_path / "gate"

    def write_after_the_gate(*arguments, **settings):
        there.touch()
        while not gate.exists():
            time.sleep(0.01)
        return write(*arguments, **settings)

    monkeypatch.setattr(filesystem_async, "_write_item", write_after_the_gate)
    pending = begin(actor, groups, tmp_path / "checkpoints", 1)
    writer = psutil.Process(pending.tensors._process.pid)
    while not there.exists():
        time.sleep(0.01)
    started = writer.children()
    writer.kill()
    _, alive = psutil.wait_procs(started, timeout=30)
    gate.touch()
    for process in alive:
        process.kill()
    assert started and not alive
    with pytest.raises(CheckpointError, match=r"step_1 was not saved: .*ended by signal 9"):
        pending.finish()


def test_a_full_disk_is_reported_at_the_end_of_a_background_save(actor, groups, tmp_path):
    folder, limits = tmp_path / "checkpoints", resource.getrlimit(resource.RLIMIT_FSIZE)
    fill(actor, 1)
    save(actor, groups, folder, 1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        pending = begin(actor, groups, folder, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    with pytest.raises(CheckpointError, match=r"step_2 was not saved: .*free space"):
        pending.finish()
    assert sorted(p.name for p in folder.iterdir()) == ["latest", "step_1"]


@pytest.fixture
def run(tiny_model, groups, tmp_path, gate):
    """A context of four steps that saves each in the background, and its actor."""
    overrides = ["optimizer.num_steps=4", "checkpoint.every_steps=1", "checkpoint.keep_last=0"]
    overrides += ["checkpoint.asynchronous=true", "checkpoint.max_in_flight=2"]
    paths = [f"model.path={tiny_model}", "data.train=x", f"output={tmp_path / 'run'}"]
    actor = make_run(tiny_model, groups)
    context = Context(load_config(None, [*paths, *overrides]), groups, 8)
    context.start(actor)
    yield context, actor
    context.close()


def test_training_continues_while_a_save_is_written_and_its_end_waits_for_all(run, gate):
    context, actor = run
    for step in (1, 2):
        context.finish_step({}, actor)
        assert context.step == step and steps(context.checkpoints) == []
    for step in (1, 2, 3, 4):
        (gate / f"step_{step}").touch()
    context.finish_step({}, actor)
    assert steps(context.checkpoints)[0] == 1
    context.finish_step({}, actor)  # the last one
    assert steps(context.checkpoints) == [1, 2, 3, 4]
    assert latest_step(context.checkpoints) == 4


def test_a_request_to_stop_waits_for_the_saves(run, gate, monkeypatch):
    context, actor = run
    context.finish_step({}, actor)
    assert steps(context.checkpoints) == []
    monkeypatch.setattr(signals, "stop_requested", lambda: True)
    opener = threading.Timer(0.5, lambda: [(gate / f"step_{step}").touch() for step in (1, 2)])
    opener.start()
    context.finish_step({}, actor)
    opener.join()
    assert context.is_leaving and steps(context.checkpoints) == [1, 2]
