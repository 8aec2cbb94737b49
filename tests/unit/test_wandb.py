"""wandb over kills and resumes, with real offline wandb: its files are read back.

Not covered: a server, which tells an online run its next step by itself.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megatron_sr1.config_file import load_config
from megatron_sr1.observability.metrics import MetricsFile
from megatron_sr1.observability.sinks import WANDB_ID_FILE, WandbSink, _history_step
from megatron_sr1.observability.wandb_files import last_step, records

pytest.importorskip("wandb")
ROOT = Path(__file__).resolve().parents[2]
RUN = """
import sys
from pathlib import Path
from tests.unit.test_wandb import go_on
go_on(Path(sys.argv[1]), 0, 30, int(sys.argv[2]), sys.argv[3])
"""


def go_on(run_dir, done, until, width, end):
    """A run's numbers from a checkpoint after `done` steps on, as trainer/context.py gives them."""
    config = load_config(None, ["model.path=m", "stage=sft", "logging.wandb=offline"])
    metrics = MetricsFile(run_dir / "metrics.jsonl")
    metrics.keep_until("sft", done)
    sink = WandbSink(run_dir, config, done)
    if end == "hold":  # else wandb's process would write what it has by itself, every 15 s or so
        for process in psutil.Process().children(recursive=True):
            process.suspend()
    for step in range(done + 1, until + 1):
        values = {"actor/loss": 1.0 / step, **{f"name_{n}": float(n) for n in range(width)}}
        metrics.append(step, "sft", values)
        sink.log(step, values)
    if end != "close":
        time.sleep(1)
        # wandb's process first: it has a session of its own, which a signal to ours does not reach.
        for process in psutil.Process().children(recursive=True):
            process.kill()
        os.kill(os.getpid(), signal.SIGKILL)
    sink.close()


def history(run_dir, awaited=0):
    """All (step, loss) in wandb's files, in the order of the files; it may write a moment later."""
    from wandb.proto import wandb_internal_pb2

    until = time.monotonic() + 20
    while True:
        found = []
        for path in sorted((run_dir / "wandb").glob("offline-run-*/*.wandb")):
            for record in map(wandb_internal_pb2.Record.FromString, records(path)):
                if record.WhichOneof("record_type") == "history":
                    items = {i.key or i.nested_key[0]: i.value_json for i in record.history.item}
                    found.append((record.history.step.num, json.loads(items["actor/loss"])))
        if len(found) >= awaited or time.monotonic() > until:
            return found
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("end", "width", "least", "most"),
    [("hold", 1, 0, 0), ("kill", 300, 1, 29), ("close", 1, 30, 30)],
    ids=["nothing written yet", "written in part", "all written"],
)
def test_every_step_is_in_wandb_once_after_a_stop(tmp_path, end, width, least, most):
    """Steps 1 to 30, then on from a checkpoint at 20: what wandb held back, and not what it has."""
    # wandb's process of an earlier test here is not to be joined.
    alone = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    command = [sys.executable, "-c", RUN, str(tmp_path), str(width), end]
    subprocess.run(command, cwd=ROOT, env=alone, timeout=120)
    before = [step for step, _ in history(tmp_path, least)]
    assert least <= len(before) <= most and before == list(range(1, len(before) + 1))
    run_id = (tmp_path / WANDB_ID_FILE).read_text()
    go_on(tmp_path, 20, 33, width, "close")
    assert history(tmp_path, 33) == [(step, 1.0 / step) for step in range(1, 34)]
    assert (tmp_path / WANDB_ID_FILE).read_text() == run_id
    names = [path.parent.name for path in (tmp_path / "wandb").glob("offline-run-*/*.wandb")]
    assert len(names) == 2 and all(name.endswith(run_id.strip()) for name in names)


def test_a_file_that_is_cut_is_read_up_to_there(tmp_path):
    import wandb

    run = wandb.init(mode="offline", dir=str(tmp_path), id="long", project="p")
    for step in range(1, 40):
        row = {f"name_{n}": n * step for n in range(300)}
        run.log({"actor/loss": step, **row}, step=step, commit=True)
    run.finish()
    assert [step for step, _ in history(tmp_path, 39)] == list(range(1, 40))
    (file,) = tmp_path.glob("wandb/offline-run-*/run-long.wandb")
    whole = file.read_bytes()
    assert len(whole) > 3 * 32768, "records do not cross the borders of blocks"
    assert last_step(tmp_path, "long", _history_step) == 39
    file.write_bytes(whole[: len(whole) // 2])
    assert 0 < last_step(tmp_path, "long", _history_step) < 39
    assert last_step(tmp_path, "other", _history_step) == 0
