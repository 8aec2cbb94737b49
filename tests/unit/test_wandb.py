"""wandb over kills and resumes, with real offline wandb: its files are read back.

Not covered: a server, which tells an online run its next step by itself.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from PIL import Image

from megatron_sr1.config.loading import load_config
from megatron_sr1.observability.metrics import MetricsFile
from megatron_sr1.observability.sinks import side_by_side
from megatron_sr1.observability.wandb_sink import (
    WANDB_FILES,
    WANDB_ID_FILE,
    WandbSink,
    last_step,
)
from megatron_sr1.rewards.score import cross
from tests.wandb_runs import history, read_table

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


def losses(run_dir, awaited=0):
    """All (step, loss) in wandb's files."""
    return [(step, values["actor/loss"]) for step, values in history(run_dir, awaited)]


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
    before = [step for step, _ in losses(tmp_path, least)]
    assert least <= len(before) <= most and before == list(range(1, len(before) + 1))
    run_id = (tmp_path / WANDB_ID_FILE).read_text()
    go_on(tmp_path, 20, 33, width, "close")
    assert losses(tmp_path, 33) == [(step, 1.0 / step) for step in range(1, 34)]
    assert (tmp_path / WANDB_ID_FILE).read_text() == run_id
    names = [path.name for path in (tmp_path / "wandb").glob("offline-run-*/*.wandb")]
    assert names == [f"run-{run_id.strip()}.wandb"] * 2


def test_a_truncated_file_is_read_up_to_its_end(tmp_path):
    import wandb

    run = wandb.init(mode="offline", dir=str(tmp_path), id="long", project="p")
    for step in range(1, 40):
        row = {f"name_{n}": n * step for n in range(300)}
        run.log({"actor/loss": step, **row}, step=step, commit=True)
    run.finish()
    assert [step for step, _ in losses(tmp_path, 39)] == list(range(1, 40))
    (file,) = tmp_path.glob("wandb/offline-run-*/run-long.wandb")
    whole = file.read_bytes()
    assert len(whole) > 3 * 32768, "records do not cross the borders of blocks"
    assert last_step(tmp_path, "long") == 39
    # The folder of a start in the same second as another gets a suffix from wandb.
    file = file.parent.rename(f"{file.parent}-1") / file.name
    assert last_step(tmp_path, "long") == 39
    file.write_bytes(whole[: len(whole) // 2])
    assert 0 < last_step(tmp_path, "long") < 39
    assert last_step(tmp_path, "other") == -1


def rollout(index, accuracy, self_reward):
    reward = {"accuracy": accuracy, "self_reward": self_reward, "total": accuracy + 0.1}
    texts = {"question": f"<image>{index}?", "gold": "7", "response": "so", "description": "seen"}
    return {"index": index, **texts, "reading": None, "advantage": -0.5, "reward": reward}


def images(index):
    """None, one or two images of a colour of their own."""
    return [Image.new("RGB", (20 + index, 10), (index, n, 200)) for n in range(index % 3)]


def test_samples_with_images_and_the_table_of_verdicts_are_in_the_run(tmp_path, monkeypatch):
    monkeypatch.setenv(WANDB_FILES, str(tmp_path / "staged"))  # as a user might
    settings = ["logging.wandb=offline", "logging.samples=3", "logging.samples_every=2"]
    sink = WandbSink(tmp_path, load_config(None, ["model.path=m", *settings]))
    verdicts = [(1, 1), (1, 0.4), (0, 1), (1, 0), (0.6, 1), (0, 0), (1, None)]
    rollouts = [rollout(index + 1, *pair) for index, pair in enumerate(verdicts)]
    for step in range(1, 4):
        sink.show(step, rollouts, images, cross(verdicts))
        sink.log(step, {"actor/loss": float(step)})
    sink.close()
    told = history(tmp_path, 3)
    assert [step for step, _ in told] == [1, 2, 3]
    assert ["samples" in values for _, values in told] == [True, True, False]
    for _, values in told[:2]:
        columns, rows = read_table(tmp_path, values["verdicts"])
        assert columns == ["", "reading right", "reading wrong"]
        assert rows == [["answer right", 2, 2], ["answer wrong", 1, 1]]
        columns, rows = read_table(tmp_path, values["samples"])
        assert columns[:2] == ["image", "question"] and columns[-2:] == ["total", "advantage"]
        assert [row[1] for row in rows] == ["<image>1?", "<image>4?", "<image>7?"]
        assert rows[2][2:] == ["7", "so", "seen", None, 1, None, 1.1, -0.5]
        for row, index in zip(rows, (1, 4, 7), strict=True):
            assert row[0].tobytes() == images(index)[0].tobytes()


def test_images_of_a_sample_are_joined_side_by_side():
    assert side_by_side([]) is None
    whole = side_by_side(images(2))
    assert whole.size == (44, 10)
    assert (whole.getpixel((0, 5)), whole.getpixel((43, 5))) == ((2, 0, 200), (2, 1, 200))
    assert side_by_side([Image.new("RGB", (2048, 1024))]).size == (512, 256)
