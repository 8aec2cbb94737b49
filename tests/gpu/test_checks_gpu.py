"""The checks of tools/gpu_check.py as tests: no row is beyond its limit, and none raises."""

import importlib.util

import pytest

from megatron_sr1.gpu_checks.registry import CHECKS, make_bench
from megatron_sr1.gpu_checks.rows import SKIPPED
from megatron_sr1.gpu_checks.worker import run_check

pytestmark = pytest.mark.gpu
IN_THEIR_OWN_PROCESS = ("engine", "grpo")
"""An engine keeps its share of the memory until its process ends: tools/gpu_check.py runs these."""


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return make_bench("cuda", tmp_path_factory.mktemp("gpu_checks"), None)


@pytest.mark.parametrize(
    "check", [c for c in CHECKS if c.name not in IN_THEIR_OWN_PROCESS], ids=lambda c: c.name
)
def test_no_row_is_beyond_its_limit(check, bench):
    if any(importlib.util.find_spec(name) is None for name in check.needs):
        pytest.skip(f"needs {', '.join(check.needs)}")
    rows = []
    run_check(check, bench, rows.append)
    bench.release()
    assert rows and [row.line() for row in rows if row.is_bad] == []
    if all(row.status == SKIPPED for row in rows):
        pytest.skip(rows[0].note)
