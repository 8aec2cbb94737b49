"""runtime/files.py: a file is replaced atomically, whatever happens."""

import os

import pytest

from megatron_sr1.runtime.files import replacing, write_text


def test_a_file_is_replaced_and_nothing_is_left_beside_it(tmp_path):
    path = tmp_path / "state.json"
    write_text(path, "old ✓\n")
    write_text(path, "new ✓\n", sync=True)
    assert path.read_text(encoding="utf-8") == "new ✓\n"
    assert [p.name for p in tmp_path.iterdir()] == ["state.json"]


def test_an_error_leaves_the_old_contents_and_no_partial_file(tmp_path):
    path = tmp_path / "state.json"
    write_text(path, "old")
    with pytest.raises(RuntimeError), replacing(path) as partial:
        partial.write_text("half of the n")
        assert path.read_text() == "old"
        raise RuntimeError
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["state.json"]


def test_sync_flushes_the_contents_before_the_name(tmp_path, monkeypatch):
    events = []
    monkeypatch.setattr(
        os, "fsync", lambda handle: events.append(os.readlink(f"/proc/self/fd/{handle}"))
    )
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda *pair: (events.append("replace"), replace(*pair)))
    write_text(tmp_path / "latest", "step_1\n", sync=True)
    partial = tmp_path / f".latest.{os.getpid()}.partial"
    assert events == [str(partial), "replace", str(tmp_path)]


def test_two_processes_can_write_the_same_file_at_once(tmp_path, monkeypatch):
    path = tmp_path / "index.json"
    with replacing(path) as first:
        first.write_text("first")
        monkeypatch.setattr(os, "getpid", lambda: 2**22 + 1)  # above the highest process id
        write_text(path, "second")
        assert path.read_text() == "second"
    assert path.read_text() == "first"
