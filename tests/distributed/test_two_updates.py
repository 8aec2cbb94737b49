"""Two updates from one batch of rollouts: clipping acts in the second, and ranks change nothing.

Not covered: more than two ranks, and a reference model (test_updates.py has one).
"""

import json
from pathlib import Path

import pytest

from megatron_sr1.demo.digits import make_digits

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parent / "ranks" / "two_updates.py"
LOW, HIGH = "1e-7", "3e-3"


@pytest.fixture(scope="module")
def found(tiny_model, run_ranks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two_updates")
    shards = make_digits(folder / "data", 1, num_train=8, num_eval=1, num_cold_start=1)
    for number in (1, 2):
        run_ranks(SCRIPT, number, tiny_model, shards["train"], folder / f"{number}", LOW, HIGH)
    return {number: json.loads((folder / f"{number}").read_text()) for number in (1, 2)}


def test_the_first_update_is_on_policy_and_the_second_is_not(found):
    for rate in (LOW, HIGH):
        first = found[1][rate]["updates"][0]
        assert first["ratio_max"] == pytest.approx(1.0, abs=1e-5)
        assert first["clipped_share"] == 0.0 and abs(first["old_kl"]) < 1e-6
    second = found[1][HIGH]["updates"][1]
    assert second["ratio_max"] > 1.3
    assert 0.02 < second["clipped_share"] < 1.0
    assert abs(second["old_kl"]) > 1e-3


def test_nothing_is_clipped_where_the_weights_hardly_move(found):
    second = found[1][LOW]["updates"][1]
    assert second["ratio_max"] == pytest.approx(1.0, abs=1e-2) and second["ratio_max"] != 1.0
    assert second["clipped_share"] == 0.0


@pytest.mark.parametrize("rate", [LOW, HIGH])
def test_two_ranks_measure_in_both_updates_what_one_process_does(found, rate):
    one, two = found[1][rate], found[2][rate]
    assert len(one["updates"]) == 2
    for mine, theirs in zip(one["updates"], two["updates"], strict=True):
        assert theirs == pytest.approx(mine, rel=2e-4, abs=2e-6)
    assert two["weights"] == pytest.approx(one["weights"], rel=1e-4)
