"""What the benchmark makes of measurements: bench.json, and which bounds hold.

The measurements here are made up; `make bench` takes real ones.
"""

import pytest

from tools.bench import (
    forked_over_barrier,
    gap_share,
    grading_line,
    grading_verdicts,
    host_table,
    host_verdicts,
    model_tables,
    report,
    summary,
    verdicts,
    widths_line,
    widths_verdicts,
)
from tools.bench_roofline import SEQUENCES
from tools.engine_steps import SCHEDULES


def schedule(steps, seconds):
    median = sorted(seconds)[len(seconds) // 2]
    return {
        "engine_steps": steps,
        "seconds": median,
        "all_seconds": seconds,
        "tokens_per_second": 100 / median,
        "simulated_equals_recorded": True,
    }


HOST = {"generate_seconds": 1.0, "one_pass_seconds": 1.03, "own_seconds": 0.05, "vllm_seconds": 1.0}
HOST |= {"ahead_seconds": 0.1, "serial_seconds": 1.0}
HOST |= {"one_pass": 1.03, "own_share": 0.05, "images": 0.1}


def measured(forked_steps=20, forked_seconds=(3.0, 1.5, 6.0), extra_bytes=200, ours=2.0, gap=0.02):
    span = {"mean": 1.0, "p50": 1.0, "p99": 2.0, "max": 2}
    lengths = {"response": span, "description": span, "reading": span}
    seed = {
        "seed": 1,
        "same_tokens": True,
        "lengths": lengths | {"descriptions": 3, "distinct_readings": 2},
        "one": schedule(20, [1.0, 2.0, 1.0]),
        "barrier": schedule(30, [4.0, 2.0, 5.0]),
        "forked": schedule(forked_steps, list(forked_seconds)),
    }
    sync = {"bytes": 9, "seconds": 0.5, "memcpy_seconds": 0.1, "extra_bytes_peak": extra_bytes}
    phases = {
        "time/step_seconds": 100.0,
        "time/pass1_seconds": 40.0,
        "time/update_seconds": 60.0 - 100 * gap,
        "time/sync_seconds": 100 * gap,
    }
    noisy = {"time/step_seconds": 500.0, "time/pass1_seconds": 40.0}
    step = {
        "median_step_seconds": {"ours": ours, "trl": 4.0},
        "ratio": ours / 4.0,
        "ratio_by_round": [0.7, 0.8],
        "median_phase_seconds": phases,
        "phase_seconds_by_step": [phases, noisy, phases],
    }
    engine = {"schedules": {"seeds": [seed]}, "sync": sync | {"largest_layer_bytes": 100}}
    return {"engine": engine, "step": step}


def gpu(forked=1.4):
    seconds = {"one": 1.0, "barrier": 2.0, "forked": forked}
    return {model: {str(n): seconds for n in SEQUENCES} for model in ("3b", "7b")}


def test_bench_json_has_its_documented_keys():
    part = summary(measured(), gpu())
    assert set(part) == {"engine_steps", "seconds", "roofline", "step_seconds", "sync"}
    assert part["engine_steps"] == {"one": 20, "barrier": 30, "forked": 20}
    assert part["seconds"] == {"one": 1.0, "barrier": 4.0, "forked": 3.0}
    assert set(part["roofline"]) == {"3b", "7b"}
    for by_num in part["roofline"].values():
        assert {num: set(times) for num, times in by_num.items()} == {
            str(num): set(SCHEDULES) for num in SEQUENCES
        }
    assert part["step_seconds"] == {"ours": 2.0, "trl": 4.0}
    assert set(part["sync"]) == {"bytes", "seconds", "memcpy_seconds", "extra_bytes_peak"}


def test_wall_times_are_compared_run_by_run():
    assert forked_over_barrier(measured()["engine"]["schedules"]["seeds"]) == [0.75, 0.75, 1.2]


def test_limits_that_hold_are_listed():
    checked = verdicts({"demo": measured(), "wide": measured()}, gpu())
    assert len(checked) == 1 + 6 + 1 + 2 * 3 and all(checked.values())
    assert "ratio 0.50, by round 0.70, 0.80" in model_tables("demo", measured())


@pytest.mark.parametrize(
    ("worse", "report"),
    [
        ({"forked_steps": 25}, "engine steps"),
        ({"forked_seconds": (4.1, 2.1, 1.0)}, "wall time"),
        ({"extra_bytes": 201}, "demo, sync"),
        ({"ours": 2.5}, "demo, a step relative to TRL's"),
        ({"gap": 0.04}, "demo, share of a step in gaps"),
    ],
)
def test_an_exceeded_limit_is_named(worse, report):
    checked = verdicts({"demo": measured(**worse), "wide": measured()}, gpu())
    assert [report in claim for claim, holds in checked.items() if not holds] == [True]


def test_the_wide_model_and_the_modelled_gpu_have_limits_too():
    checked = verdicts({"demo": measured(), "wide": measured(extra_bytes=201)}, gpu(1.6))
    failed = [claim for claim, holds in checked.items() if not holds]
    assert len(failed) == 7 and "wide, sync" in failed[-1]


def test_what_no_phase_of_engine_or_actor_names_is_a_gap():
    phases = {"time/step_seconds": 2.0, "time/pass1_seconds": 1.0, "time/sync_seconds": 0.5}
    assert gap_share(phases) == 0.5
    assert gap_share(phases | {"time/reference_seconds": 0.25, "time/pass2_seconds": 0.25}) == 0.25
    assert gap_share(phases | {"time/wait_seconds": 0.25}) == 0.375


def test_an_update_at_published_widths_has_a_limit(capsys):
    found = {"tokens_per_second": {"ours": [60.0, 90.0], "trainer": [40.0, 50.0]}}
    found |= {"ratio_by_round": [1.5, 1.8], "ratio": 1.65}
    assert "ours 75 tokens a second, transformers' Trainer 45, ratio 1.65" in widths_line(found)
    assert report(widths_verdicts(found)) == 0
    assert report(widths_verdicts(found | {"ratio": 1.49})) == 1
    assert "DOES NOT HOLD: 3B's widths" in capsys.readouterr().out


def test_host_time_has_limits_and_an_exit_status(capsys):
    assert report(host_verdicts(HOST)) == 0
    rows = host_table(HOST).splitlines()[2:]
    assert [row.split(" | ")[-2:] for row in rows] == [
        ["1.030", "1.03 |"],
        ["0.050", "0.05 |"],
        ["0.100", "0.10 |"],
    ]
    for name in ("one_pass", "own_share", "images"):
        assert report(host_verdicts(HOST | {name: 1.04})) == 1
        assert f"DOES NOT HOLD: host, {name}: 1.040" in capsys.readouterr().out


def test_grading_has_limits_and_an_exit_status(capsys):
    found = {"after_pass1_seconds": 20.0, "after_reward_seconds": 10.0, "early_pass1_seconds": 22.0}
    found |= {"early_reward_seconds": 1.0, "left_share": 0.1, "step": 23 / 30}
    assert "afterwards 20.0 + 10.0 s, while they are sampled 22.0 + 1.0 s" in grading_line(found)
    assert report(grading_verdicts(found)) == 0
    for name, worse in {"left_share": 0.21, "step": 1.01}.items():
        assert report(grading_verdicts(found | {name: worse})) == 1
        assert f"DOES NOT HOLD: grading, {name}: {worse:.3f}" in capsys.readouterr().out
