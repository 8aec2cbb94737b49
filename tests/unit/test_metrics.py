"""metrics.jsonl, the meter of phases and the sinks."""

import json
import logging
import sys
from pathlib import Path

import pytest

from megatron_sr1.config.loading import load_config
from megatron_sr1.observability import profiling, sinks
from megatron_sr1.observability.metrics import MetricsFile, read_lines
from megatron_sr1.observability.profiling import StepMeter
from megatron_sr1.observability.sinks import ProgressSink, make_sinks


def steps(path: Path, stage: str = "grpo") -> list[int]:
    return [line["step"] for line in read_lines(path) if line["stage"] == stage]


def test_a_line_is_on_disk_as_soon_as_it_is_appended(tmp_path):
    file = MetricsFile(tmp_path / "run" / "metrics.jsonl")
    file.append(0, "grpo", {"reward/accuracy": 0.5, "mismatch/kl": float("nan")})
    assert json.loads(file.path.read_text()) == {
        "step": 0,
        "stage": "grpo",
        "reward/accuracy": 0.5,
        "mismatch/kl": None,
    }


def test_resuming_drops_later_lines_of_that_stage_only(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    for step in range(4):
        file.append(step, "sft", {"actor/loss": 1.0})
    for step in range(6):
        file.append(step, "grpo", {"reward/accuracy": 0.1 * step})
    resumed = MetricsFile(path)
    resumed.keep_until("grpo", 2)
    resumed.append(3, "grpo", {"reward/accuracy": 0.9})
    assert steps(path) == [0, 1, 2, 3] and steps(path, "sft") == [0, 1, 2, 3]
    assert read_lines(path)[-1]["reward/accuracy"] == 0.9
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"], "a partial file is left"


def test_a_line_truncated_by_a_kill_is_removed(tmp_path):
    path = tmp_path / "metrics.jsonl"
    MetricsFile(path).append(0, "grpo", {"a": 1.0})
    with open(path, "a") as file:
        file.write('{"step": 1, "stage": "grpo", "a":')
    MetricsFile(path).append(1, "grpo", {"a": 2.0})
    assert [line["a"] for line in read_lines(path)] == [1.0, 2.0]


def test_a_step_is_never_written_twice(tmp_path):
    path = tmp_path / "metrics.jsonl"
    MetricsFile(path).append(5, "grpo", {})
    with pytest.raises(ValueError, match="step 5"):
        MetricsFile(path).append(5, "grpo", {})


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_inner_phases_are_not_counted_twice():
    clock = Clock()
    meter = StepMeter(clock)
    clock.now = 1.0
    with meter.phase("update"):
        clock.now = 3.0
        with meter.phase("sync"):
            clock.now = 7.0
        clock.now = 8.0
    with meter.phase("sync"):
        clock.now = 9.0
    assert meter.take()[0] == {
        "time/sync_seconds": 5.0,
        "time/update_seconds": 3.0,
        "time/step_seconds": 9.0,
    }
    clock.now = 11.0
    assert meter.take()[0] == {"time/step_seconds": 2.0}


def test_moved_time_is_never_more_than_there_was():
    clock = Clock()
    meter = StepMeter(clock)
    with meter.phase("pass1"):
        clock.now = 4.0
    meter.move("pass1", "pass2", 1.5)
    meter.move("pass1", "pass2", 100.0)
    taken = meter.take()[0]
    assert taken["time/pass1_seconds"] == 0.0 and taken["time/pass2_seconds"] == 4.0


def ballast(mib: int) -> bytes:
    return b"x" * (mib * 2**20)  # written to, so resident


def test_memory_peaks_are_assigned_to_the_innermost_phase():
    meter = StepMeter()
    with meter.phase("sync"):
        pass
    with meter.phase("update"):
        with meter.phase("reference"):
            ballast(256)
        ballast(128)
    values = meter.take()[1]
    base = values["memory/sync_host_gib"]
    assert values["memory/reference_host_gib"] - base == pytest.approx(0.25, abs=0.03)
    assert values["memory/update_host_gib"] - base == pytest.approx(0.125, abs=0.03)
    assert values["memory/host_peak_gib"] >= values["memory/reference_host_gib"]
    assert values["memory/host_gib"] < values["memory/reference_host_gib"]
    again = meter.take()[1]
    assert "memory/sync_host_gib" not in again
    assert again["memory/host_peak_gib"] == values["memory/host_peak_gib"]


def test_phases_have_no_peak_where_it_cannot_be_reset(monkeypatch, tmp_path):
    monkeypatch.setattr(profiling, "CLEAR", tmp_path / "absent" / "clear_refs")
    meter = StepMeter()
    with meter.phase("sync"):
        pass
    values = meter.take()[1]
    assert values.keys() == {"memory/host_gib", "memory/host_peak_gib"}
    assert values["memory/host_peak_gib"] >= values["memory/host_gib"] > 0.01


def test_a_log_line_has_the_step_and_the_main_metrics(tmp_path, caplog):
    config = load_config(None, ["model.path=m", "optimizer.num_steps=40", "logging.progress=false"])
    (sink,) = make_sinks(config, tmp_path)
    with caplog.at_level(logging.INFO, logger="megatron_sr1"):
        sink.log(1, {"reward/total": 0.75, "groups/zero": 3.0})
    assert caplog.messages == ["grpo 1/40: reward 0.75"]


def test_short_steps_share_a_log_line_and_the_last_step_always_has_one(caplog, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(sinks.time, "monotonic", lambda: now[0])
    sink = sinks.LogSink("sft", 40)
    with caplog.at_level(logging.INFO, logger="megatron_sr1"):
        for step in range(1, 41):
            sink.log(step, {"actor/loss": 0.5})
            now[0] += sinks.LINE_SECONDS / 16
    logged = [message.split("/")[0] for message in caplog.messages]
    assert logged == ["sft 1", "sft 17", "sft 33", "sft 40"]


def test_a_log_line_appears_above_the_bar_and_the_stream_is_restored(capsys):
    stream = logging.StreamHandler(sys.stderr)
    logging.getLogger().addHandler(stream)
    try:
        bar = ProgressSink("grpo", 3, 1)
        assert stream.stream is sys.stderr
        bar.log(2, {"reward/total": 0.5})
        bar.close()
        assert stream.stream is sys.stderr
    finally:
        logging.getLogger().removeHandler(stream)
    assert "2/3" in capsys.readouterr().err
