"""TensorBoard over kills and resumes: its event files are read back with its own reader."""

import io
import json
import math
import sys

import pytest
from PIL import Image

from megatron_sr1.config.loading import load_config
from megatron_sr1.errors import ConfigError
from megatron_sr1.observability import sinks
from megatron_sr1.observability.metrics import MetricsFile
from megatron_sr1.observability.sinks import check_installed, make_sinks
from megatron_sr1.observability.tensorboard_sink import TensorBoardSink
from megatron_sr1.rewards.score import cross
from tests.unit.test_wandb import images, rollout

accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
TEXT = "{}/text_summary"


def config(*settings):
    return load_config(None, ["model.path=m", "stage=grpo", "logging.tensorboard=true", *settings])


def read(run_dir):
    """Everything that TensorBoard shows of the run."""
    found = accumulators.EventAccumulator(
        str(run_dir / "tensorboard"), {"scalars": 0, "images": 0, "tensors": 0}
    )
    return found.Reload()


def scalars(run_dir, name):
    return [(event.step, event.value) for event in read(run_dir).Scalars(name)]


def text(found, tag):
    (value,) = found.Tensors(TEXT.format(tag))[-1].tensor_proto.string_val
    return value.decode()


def test_scalars_are_readable_at_once_without_a_close(tmp_path):
    sink = TensorBoardSink(tmp_path, config())
    for step in range(3):
        sink.log(step, {"reward/accuracy": 0.25 * step, "mismatch/kl": math.nan})
    assert scalars(tmp_path, "reward/accuracy") == [(0, 0.0), (1, 0.25), (2, 0.5)]
    assert all(math.isnan(value) for _, value in scalars(tmp_path, "mismatch/kl"))
    written = json.loads(text(read(tmp_path), "configuration"))
    assert written["logging"]["tensorboard"] is True
    sink.close()


@pytest.mark.parametrize("saved", [0, 20])
def test_steps_that_are_done_again_after_a_kill_are_there_once(tmp_path, saved):
    killed = TensorBoardSink(tmp_path, config("logging.samples=1", "logging.samples_every=1"))
    for step in range(31):  # step 0 is an evaluation at the start
        killed.show(step, [rollout(1, 1, 1)], images, cross([(1, 1)]))
        killed.log(step, {"actor/loss": float(step)})
    resumed = TensorBoardSink(tmp_path, config(), saved)
    first = saved + 1 if saved else 0
    for step in range(first, 34):
        resumed.log(step, {"actor/loss": 100.0 + step})
    resumed.close()
    kept = [(step, float(step)) for step in range(first)]
    done_again = [(step, 100.0 + step) for step in range(first, 34)]
    assert scalars(tmp_path, "actor/loss") == kept + done_again
    if saved:
        shown = [event.step for event in read(tmp_path).Images("samples/1")]
        assert shown == list(range(saved + 1))


def test_a_run_that_had_no_tensorboard_gets_its_finished_steps(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    metrics.append(1, "sft", {"actor/loss": 9.0})
    for step in range(1, 6):
        metrics.append(step, "grpo", {"actor/loss": float(step)})
    for done in (3, 5):  # the second start has event files
        sink = TensorBoardSink(tmp_path, config(), done)
        sink.log(done + 1, {"actor/loss": 50.0 + done})
        sink.close()
    expected = [(1, 1.0), (2, 2.0), (3, 3.0), (4, 53.0), (6, 55.0)]
    assert scalars(tmp_path, "actor/loss") == expected


def test_samples_are_shown_with_their_images_and_their_texts_as_they_are(tmp_path):
    sink = TensorBoardSink(tmp_path, config("logging.samples=3", "logging.samples_every=2"))
    verdicts = [(1, 1), (1, 0.4), (0, 1), (1, 0), (0.6, 1), (0, 0), (1, None)]
    rollouts = [rollout(index + 1, *pair) for index, pair in enumerate(verdicts)]
    rollouts[0] |= {"response": "# <script>\n![x](http://x)"}
    for step in range(1, 4):
        sink.show(step, rollouts, images, cross(verdicts))
        if step == 1:
            sink.show_answers("held", [{**rollouts[1], "accuracy": 1, "self_reward": 0}], images)
        sink.log(step, {"actor/loss": 1.0})
    sink.close()
    found = read(tmp_path)
    by_tag = {tag: [event.step for event in found.Images(tag)] for tag in found.Tags()["images"]}
    # The third sample, 7, has one image; 4 has one; 1 has one. The held-out one has two.
    assert by_tag == {f"samples/{n}": [1, 2] for n in (1, 2, 3)} | {"evaluation/held/1": [1]}
    data = found.Images("samples/2")[0].encoded_image_string
    assert Image.open(io.BytesIO(data)).convert("RGB").tobytes() == images(4)[0].tobytes()
    shown = text(found, "samples/1")
    assert "    # <script>" in shown and "    ![x](http://x)" in shown
    assert all(line.startswith("    ") for line in shown.splitlines()), "no code block"
    assert "<image>1?" in shown and "advantage:\n    -0.5" in shown


def test_no_samples_with_samples_0(tmp_path):
    sink = TensorBoardSink(tmp_path, config("logging.samples=0"))
    sink.show(1, [rollout(1, 1, 1)], images, cross([(1, 1)]))
    sink.log(1, {"a": 1.0})
    sink.close()
    assert read(tmp_path).Tags()["images"] == []


def test_the_sinks_of_a_run_include_it_where_configured(tmp_path):
    kinds = {type(sink) for sink in make_sinks(config(), tmp_path)}
    assert TensorBoardSink in kinds
    assert TensorBoardSink not in {
        type(sink) for sink in make_sinks(config("logging.tensorboard=false"), tmp_path)
    }


def test_without_the_package_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match="pip install tensorboard, or set logging.tensorboard=f"):
        TensorBoardSink(tmp_path, config())


@pytest.mark.parametrize("setting", ["logging.tensorboard=true", "logging.wandb=offline"])
def test_a_missing_package_is_reported_before_anything_is_loaded(monkeypatch, setting):
    monkeypatch.setattr(sinks, "find_spec", lambda name: None)
    check_installed(config("logging.tensorboard=false").logging)
    with pytest.raises(ConfigError, match="pip install (wandb|tensorboard), or set"):
        check_installed(config("logging.tensorboard=false", setting).logging)
