"""A save that is cut short anywhere leaves a directory to resume from; a full disk is reported.

The crash comes before each file operation of a save in turn, by an audit hook of the interpreter,
and passes all handlers as a kill would. The disk is a real small file system where it may be
mounted; files of limited size are real everywhere.
Not covered: a loss of power, of which test_checkpoint_verify.py has the order of things.
"""

import contextlib
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

from megatron_sr1.checkpoint import disk
from megatron_sr1.checkpoint.folders import latest_step, whole_steps
from megatron_sr1.checkpoint.loading import verify_folder
from megatron_sr1.errors import CheckpointError
from tests.checkpoint_run import fill, held, load, make_run, save

CHANGES = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree", "shutil.copyfile")
hook: dict = {"folder": None}


class Crash(BaseException):
    """Stands for a kill: nothing but it may run after it."""


def audit(event, arguments):
    folder = hook["folder"]
    if folder is None or os.getpid() != hook["pid"]:
        return
    writes = event == "open" and (arguments[1] or "r")[0] not in "r" and folder in str(arguments[0])
    removes = event in ("os.remove", "os.rmdir")  # by their names alone, within a folder
    if writes or removes or (event in CHANGES and folder in str(arguments[0])):
        hook["count"] += 1
        hook["events"].append((event, str(arguments[0])))
        if hook["count"] > hook["after"]:
            raise Crash(event, *arguments)


@pytest.fixture(scope="module", autouse=True)
def audited():
    sys.addaudithook(audit)  # stays until the end of the process
    yield
    hook["folder"] = None


@contextlib.contextmanager
def crash_after(folder, count):
    hook.update(folder=str(folder), count=0, after=count, pid=os.getpid(), events=[])
    try:
        yield
    finally:
        hook["folder"] = None


@pytest.fixture(scope="module")
def actor(tiny_model, groups):
    return make_run(tiny_model, groups)


@pytest.fixture(scope="module")
def first(actor, groups, tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("first") / "checkpoints"
    fill(actor, 2)
    save(actor, groups, folder, 2, tiny_model)
    return folder


@pytest.mark.parametrize(
    ("keep_last", "stride"),
    [
        (1, 6),
        pytest.param(1, 1, marks=pytest.mark.slow),
        pytest.param(2, 1, marks=pytest.mark.slow),
    ],
)
def test_a_crash_before_any_file_operation_leaves_what_can_be_resumed(
    actor, groups, first, tiny_model, tmp_path, keep_last, stride
):
    crashes, count, whole = [], 0, False
    while not whole:
        folder = tmp_path / f"crash_{count}"
        shutil.copytree(first, folder)
        fill(actor, 4)
        try:
            with crash_after(folder, count):
                save(actor, groups, folder, 4, tiny_model, keep_last)
            whole = True
        except Crash as crash:
            crashes.append(str(crash))
        step = latest_step(folder)
        assert step in whole_steps(folder), crashes
        verify_folder(folder / f"step_{step}", groups, digests=True)
        if count % 6 == 0 or whole:
            assert load(actor, groups, folder) == {"n": step}, crashes
            assert held(actor) == step
            fill(actor, 4)
            if step == 2:  # and the same save goes through
                save(actor, groups, folder, 4, tiny_model, keep_last)
                assert latest_step(folder) == 4 and not list(folder.glob(".step_*"))
        shutil.rmtree(folder)
        count += stride
    events = {event for event, _ in hook["events"]}
    assert {"open", "os.rename", "os.mkdir"} <= events and ("os.rmdir" in events) == (
        keep_last == 1
    )
    assert count > 25, hook["events"]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own; `grow(size)` makes it larger."""
    target = tmp_path / "disk"
    target.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(target)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no file system may be mounted here: {done.stderr.strip()}")

    def grow(size_bytes):
        option = f"remount,size={size_bytes}"
        subprocess.run(["mount", "-o", option, str(target)], check=True, capture_output=True)

    yield target, grow
    subprocess.run(["umount", str(target)], check=True)


def size_of(folder):
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def check_goes_on(actor, groups, folder, make_room):
    """Step 2 is intact, nothing half is left, and step 4 can be saved when there is room."""
    assert sorted(p.name for p in folder.iterdir()) == ["latest", "step_2"]
    load(actor, groups, folder)
    assert held(actor) == 2
    make_room()
    fill(actor, 4)
    save(actor, groups, folder, 4)
    load(actor, groups, folder)
    assert held(actor) == 4


@pytest.mark.parametrize("looks", [True, False], ids=["seen before", "met while writing"])
def test_a_full_disk_is_reported_and_harms_nothing(
    actor, groups, first, small_disk, monkeypatch, looks
):
    mounted, grow = small_disk
    folder, size = mounted / "checkpoints", size_of(first)
    grow(size * 3 // 2)
    shutil.copytree(first, folder)
    if not looks:  # as a quota hides what is left
        free = [2**50]
        monkeypatch.setattr(disk, "free_bytes", lambda folder: free[0])
    with pytest.raises(CheckpointError) as caught:
        save(actor, groups, folder, 4)
    assert "No space left on device" in str(caught.value) and str(folder) in str(caught.value)
    assert "step_4 was not saved" in str(caught.value) and "MiB" in str(caught.value)
    check_goes_on(actor, groups, folder, lambda: grow(size * 4))


def test_the_space_needed_is_estimated_closely(actor, first):
    from megatron_sr1.checkpoint.tensors import sharded_state
    from megatron_sr1.runtime import cpu

    with cpu.megatron_mode():
        needed = disk.needed_bytes(sharded_state(actor.wrapped, actor.optimizer, is_loading=False))
    came = size_of(first)
    assert came <= needed + disk.OTHER_BYTES < came * 1.2


@pytest.mark.parametrize("limit", [100_000, 1000, 0], ids=["tensors", "common", "anything"])
def test_a_file_that_cannot_grow_is_reported(actor, groups, first, tmp_path, limit):
    """In a writing process of Megatron's, and in this one."""
    folder = tmp_path / "checkpoints"
    shutil.copytree(first, folder)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(CheckpointError, match="step_4 was not saved") as caught:
            save(actor, groups, folder, 4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    if limit == 100_000:
        assert "File too large" in str(caught.value)
    check_goes_on(actor, groups, folder, lambda: None)


def test_a_writing_process_that_is_killed_ends_the_save(actor, groups, first, tmp_path):
    """Megatron would wait for it for ever."""
    folder = tmp_path / "checkpoints"
    shutil.copytree(first, folder)
    me, stop = psutil.Process(), threading.Event()
    before = set(me.children())

    def kill():
        while not stop.is_set():
            for child in set(me.children()) - before:
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.send_signal(signal.SIGKILL)
            time.sleep(0.0005)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        with pytest.raises(CheckpointError, match="which wrote tensors, was ended by signal 9"):
            save(actor, groups, folder, 4)
    finally:
        stop.set()
        killer.join()
    check_goes_on(actor, groups, folder, lambda: None)
