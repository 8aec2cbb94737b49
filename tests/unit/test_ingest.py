"""Shards by several processes, in several attempts: always the same bytes, in whole shards."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from megatron_sr1.data.ingest import Conversion, make_shards
from megatron_sr1.data.shards import DATASET_FILE, ShardReader
from megatron_sr1.data.sources import open_source
from megatron_sr1.data.tally import Tally
from megatron_sr1.errors import DataError
from tests.ranks import ROOT
from tools import make_shards as tool

TOOL = [sys.executable, str(ROOT / "tools" / "make_shards.py")]


def picture(number, side=16):
    pixels = np.random.default_rng(number).integers(256, size=(side, side, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def write_rows(path, count, side=16, group=7):
    """Rows of which every tenth has no answer, in row groups that no batch fits."""
    rows = [
        {
            "problem": f"<image>{i}?",
            "answer": str(i) if i % 10 != 3 else None,
            "images": [{"bytes": picture(i, side), "path": None}],
        }
        for i in range(count)
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=group)
    return path


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two parquet files and what one call makes of them."""
    made = tmp_path_factory.mktemp("ingest")
    (made / "rows").mkdir()
    for name, count in (("a", 60), ("b", 43)):
        write_rows(made / "rows" / f"{name}.parquet", count)
    assert tool.main([*options(made, "whole")]) == 0
    return made


def options(folder, target, *more):
    return [str(folder / "rows"), str(folder / target), "--samples-per-shard", "20", *more]


def test_several_processes_write_the_same_bytes_as_one(folder, tmp_path):
    done = subprocess.run(
        [*TOOL, *options(folder, tmp_path / "two", "--workers", "2")],
        capture_output=True,
        text=True,
    )
    assert done.stdout.startswith(f"{tmp_path / 'two'}: 93 samples, 10 skipped\n"), done.stderr
    assert contents(tmp_path / "two") == contents(folder / "whole")
    assert len(list((tmp_path / "two").glob("*.tar"))) == 5
    told = re.findall(r"skipped: ([ab].parquet) row (\d+): no gold answer", done.stderr)
    assert told == [("a.parquet", str(i)) for i in range(3, 60, 10)] + [
        ("b.parquet", str(i)) for i in range(3, 43, 10)
    ]


class Stopped(Exception):
    """What ends a call between two rows."""


def make(folder, target, stop_after=None, **settings):
    """Make shards in this process, or up to some row; returns the rows that were read."""
    source, tally = open_source(str(folder / "rows")), Tally("100", say=lambda text: None)
    first = []

    def watch(tally):
        first.append(tally.rows)
        if tally.rows == stop_after:
            raise Stopped

    convert = Conversion(**{k: settings.pop(k) for k in ("columns",) if k in settings})
    own = {"samples_per_shard": 20, **settings}
    make_shards(source, target, convert, tally, watch=watch, **own)
    return first[0], tally


def rows_of(shards):
    """Rows up to the last sample of so many shards."""
    good = [n for n, i in enumerate([*range(60), *range(43)]) if i % 10 != 3]
    return good[20 * shards - 1] + 1 if shards else 0


@pytest.mark.parametrize(("stop_after", "shards"), [(5, 0), (21, 0), (22, 1), (50, 2), (102, 4)])
def test_a_call_that_was_stopped_goes_on_after_the_last_whole_shard(
    folder, tmp_path, stop_after, shards
):
    with pytest.raises(Stopped):
        make(folder, tmp_path / "out", stop_after)
    with pytest.raises(DataError, match="cut short|no .tar shards"):
        ShardReader(tmp_path / "out")
    kept = {p.name: p.stat().st_ino for p in (tmp_path / "out").glob("*.tar")}
    first, tally = make(folder, tmp_path / "out")
    assert (first, len(kept)) == (rows_of(shards), shards)
    assert (tally.rows, tally.skipped, tally.given) == (103, 10, 93)
    for name, inode in kept.items():
        assert (tmp_path / "out" / name).stat().st_ino == inode, f"{name} was written again"
    whole = contents(folder / "whole")
    report = json.loads(whole.pop("report.json"))
    assert tally.report(93) == report
    assert contents(tmp_path / "out") == whole


def test_other_settings_or_other_files_start_from_the_beginning(folder, tmp_path):
    for change in (
        {"samples_per_shard": 19},
        {"limit": 80},
        {"columns": {"answer": "problem"}},
    ):
        with pytest.raises(Stopped):
            make(folder, tmp_path / "out", 50)
        assert make(folder, tmp_path / "out", **change)[0] == 0, change
        for path in (tmp_path / "out").iterdir():
            path.unlink()
    with pytest.raises(Stopped):
        make(folder, tmp_path / "out", 50)
    (tmp_path / "rows").mkdir()
    for path in (folder / "rows").iterdir():
        (tmp_path / "rows" / path.name).write_bytes(path.read_bytes())
    assert make(tmp_path, tmp_path / "out")[0] == 0


def test_a_shard_that_is_not_what_was_written_starts_from_the_beginning(folder, tmp_path):
    with pytest.raises(Stopped):
        make(folder, tmp_path / "out", 50)
    with open(tmp_path / "out" / "shard-000000.tar", "r+b") as file:
        file.truncate(5000)
    assert make(folder, tmp_path / "out")[0] == 0


def test_more_skipped_rows_may_be_allowed_without_reading_all_again(folder, tmp_path):
    assert tool.main(options(folder, tmp_path / "out", "--max-skipped", "6")) == 1
    assert json.loads((tmp_path / "out" / DATASET_FILE).read_text())["complete"] is False
    first, _ = make(folder, tmp_path / "out")
    assert first == rows_of(2)  # up to the seventh fault there are 57 samples
    whole = contents(folder / "whole")
    assert {**contents(tmp_path / "out"), "report.json": b""} == {**whole, "report.json": b""}


def test_a_limit_counts_the_samples_of_all_calls(folder, tmp_path):
    with pytest.raises(Stopped):
        make(folder, tmp_path / "out", 30, limit=41)
    assert make(folder, tmp_path / "out", limit=41)[1].given == 41
    assert len(ShardReader(tmp_path / "out")) == 41


def test_killed_and_started_again_with_other_workers_the_bytes_are_the_same(tmp_path):
    """SIGKILL between shards; the processes that convert end, too."""
    (tmp_path / "rows").mkdir()
    write_rows(tmp_path / "rows" / "a.parquet", 400)
    own = ["--samples-per-shard", "2"]
    command = [*TOOL, str(tmp_path / "rows"), str(tmp_path / "out"), *own]
    started = subprocess.Popen([*command, "--workers", "2"], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (tmp_path / "out" / "shard-000001.tar").exists():
        assert started.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    children = psutil.Process(started.pid).children(recursive=True)
    started.send_signal(signal.SIGKILL)
    started.wait()
    assert len(children) >= 2 and psutil.wait_procs(children, timeout=20)[1] == []
    state = json.loads((tmp_path / "out" / DATASET_FILE).read_text())
    assert not state["complete"] and state["shards"], "killed too late or too early"
    kept = (tmp_path / "out" / "shard-000000.tar").stat().st_ino
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    number = len(state["shards"])
    told = f"continuing after {2 * number} samples in {number} whole shards\n"
    assert again.stderr.startswith(told)
    assert (tmp_path / "out" / "shard-000000.tar").stat().st_ino == kept
    assert tool.main([str(tmp_path / "rows"), str(tmp_path / "whole"), *own]) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_killed_worker_is_one_clear_error(tmp_path):
    (tmp_path / "rows").mkdir()
    write_rows(tmp_path / "rows" / "a.parquet", 400)
    source, tally = open_source(str(tmp_path / "rows")), Tally("100", say=lambda text: None)

    def kill(tally):
        if tally.rows == 1:
            for child in psutil.Process().children():
                if "spawn_main" in " ".join(child.cmdline()):
                    child.kill()

    with pytest.raises(
        DataError, match="was killed; start again to continue, with fewer --workers"
    ):
        make_shards(source, tmp_path / "out", Conversion(), tally, workers=2, watch=kill)


def test_an_error_of_the_source_comes_after_the_rows_before_it(tmp_path):
    rows = write_rows(tmp_path / "a.parquet", 200)
    column = pyarrow.parquet.read_metadata(rows).row_group(20).column(0)
    with open(rows, "r+b") as file:
        file.seek(column.data_page_offset)
        file.write(b"\xff" * 20)
    told = []
    for workers in (1, 2):
        source, tally = open_source(str(rows)), Tally("100", say=lambda text: None)
        with pytest.raises(DataError, match=r"a.parquet: row \d+ or a later one is") as error:
            make_shards(source, tmp_path / str(workers), Conversion(), tally, workers=workers)
        told.append((str(error.value), tally.report(0)))
    assert told[0] == told[1] and told[0][1]["rows"] >= 64


def test_lines_of_progress_have_rate_and_time_left(capsys, monkeypatch):
    clock = iter([100.0, 100.0, 104.0, 116.0, 120.0])
    monkeypatch.setattr(tool.time, "monotonic", lambda: next(clock))
    show = tool.lines(5000, 15.0)
    for rows in (1000, 1400, 2600, 2700):
        show(Tally(rows=rows, skipped=3))
    # 1,600 rows in 16 seconds: the first 1,000 are those of an earlier call.
    assert capsys.readouterr().err == "2,600 of 5,000 rows, 100.0 rows/s, 24 s left, 3 skipped\n"


def test_on_a_terminal_a_bar_shows_rows_rate_and_time_left(folder, tmp_path):
    import pty

    reader, writer = pty.openpty()
    done = subprocess.run(
        [*TOOL, *options(folder, tmp_path / "out")],
        stderr=writer,
        stdout=subprocess.DEVNULL,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "100"},
    )
    os.close(writer)
    shown = b""
    while True:
        try:
            shown += os.read(reader, 2**16)
        except OSError:  # Linux's end of a terminal without writers
            break
    assert done.returncode == 0
    assert re.search(
        r"making shards.*103/103.*rows/s.*0:00:00", re.sub(r"\x1b\[[\d;?]*\w", "", shown.decode())
    )
