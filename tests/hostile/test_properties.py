"""The targets of `tools/fuzz.py`, each for some seconds on the same cases every time."""

import pytest
from hypothesis import HealthCheck, given, seed, settings

from tests.hostile.targets import TARGETS

NUM_CASES = {"parsing": 400, "packing": 200, "shards": 100, "examples": 200, "images": 200}


@pytest.mark.parametrize("name", TARGETS)
def test_random_input_is_read_rightly_or_refused(name):
    strategy, check = TARGETS[name]

    @seed(7)
    @settings(
        max_examples=NUM_CASES[name],
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def run(case):
        check(case)

    run()
