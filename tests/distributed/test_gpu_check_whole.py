"""tools/gpu_check.py from end to end on a CPU: every line of the checks that needs no CUDA."""

import json
import os
import subprocess
import sys

import pytest

from megatron_sr1.gpu_checks.registry import CHECKS
from tests.distributed.test_te_double import SCRIPT, with_double
from tests.ranks import ROOT

pytestmark = pytest.mark.slow
NOT_HERE = {"transformer_engine"}


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    output = tmp_path_factory.mktemp("gpu_check") / "table.json"
    command = [sys.executable, str(ROOT / "tools" / "gpu_check.py"), "--device", "cpu"]
    command += ["--minutes", "45", "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=output.parent)
    log = output.with_suffix(".log").read_text()
    assert done.returncode == 0, f"{done.stdout}\n{log[-4000:]}"
    return json.loads(output.read_text())


def test_every_check_runs_to_its_end_and_stays_within_its_limits(table):
    assert table["finished"] and table["kind"] == "cpu"
    by_check = {check.name: [] for check in CHECKS}
    for row in table["rows"]:
        by_check[row["check"]].append(row)
    for name, rows in by_check.items():
        found = {row["status"] for row in rows}
        assert found == {"skipped"} if name in NOT_HERE else found and found <= {"ok", "info"}, rows


def test_each_kind_of_number_is_there(table):
    names = {row["name"] for row in table["rows"]}
    wanted = {
        "float32 logits, from transformers'",
        "bfloat16 gradients, from float32",
        "tokens a second",
        "share of products",
        "text, masked (parallel.context > 1): result",
        "weight sync",
        "engine and actor, after an update and a sync: mean",
        "engine and actor, after sleep, wake and sync: largest",
        "tokens of pass 2",
        "update after loading, off the one after saving",
        "reduce-scatter of gradients",
        "first grad_norm, off the default's",
    }
    assert wanted <= names, wanted - names


def test_the_file_is_left_where_the_user_asked_for_it(table, tmp_path):
    """Options that select nothing expensive; the exit status counts failures only."""
    command = [sys.executable, str(ROOT / "tools" / "gpu_check.py"), "--only", "transformer_engine"]
    done = subprocess.run(
        [*command, "--device", "cpu"], capture_output=True, text=True, cwd=tmp_path, env=os.environ
    )
    assert done.returncode == 0 and "not installed: transformer_engine" in done.stdout
    assert len(json.loads((tmp_path / "gpu_check.json").read_text())["rows"]) == 1


def test_the_rows_about_transformer_engine_are_made_with_its_double(tmp_path, run_ranks):
    """The double computes what the local layers do, in FP8 too, and is slower or faster."""
    done = run_ranks(SCRIPT.with_name("te_checks.py"), 1, tmp_path, env=with_double(), timeout=900)
    line = next(line for line in done.stdout.splitlines() if line.startswith("ROWS "))
    rows = {row["name"]: row for row in json.loads(line.removeprefix("ROWS "))}
    of_time = {"forward and backward pass over local layers'"}
    assert [n for n, row in rows.items() if row["status"] == "ERROR"] == []
    assert {n for n, row in rows.items() if row["status"] == "FAIL"} <= of_time
    for recipe in ("current", "blockwise", "delayed"):
        assert rows[f"FP8 {recipe}: logits, from float32"]["status"] == "ok"
    assert rows["norm, off ours"]["status"] == "ok"
