"""Layouts and packings give the same losses, gradients, logprobs and weights as one process.

Not covered here: bfloat16.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from megatron_sr1.demo.digits import corpus_texts
from megatron_sr1.demo.tiny_model import make_tiny_model

SCRIPT = Path(__file__).parent / "ranks" / "updates.py"
ONE, SPLIT, ALONE = "1x1x1@4096", "1x1x1@48", "1x1x1@0"  # the last without packing
SHARED = ["1x1x1@4096p", "1x1x1@128p"]  # a prompt is computed once for its samples in a row
ADAPTED = "1x1x1@4096a"
ADAPTED_OTHERS = ["2x1x1si@64a", "1x2x1v@64a", "1x1x1@64a"]
MORE_ADAPTED = ["2x1x1@64a", "2x1x1s@64a", "1x2x1@64a", "1x2x1u@64a", "1x1x2@64a", "1x1x2@0a"]
MORE_ADAPTED += ["2x1x1i@4096ap"]
FROZEN, FROZEN_OTHERS = "1x1x1@4096f", ["1x2x1@64f", "1x1x2@64f"]
OBJECTIVES = ["sequence_mean", "dr_grpo", "gspo", "gspo_corrected", "token_corrected"]
OF_ONE = [f"{ONE}:{name}" for name in OBJECTIVES]
# Data parallel, six samples against five in several rows a rank; context parallel; two stages.
OF_TWO = [f"1x1x{context}@64:{name}" for context in (1, 2) for name in OBJECTIVES]
OF_TWO += ["1x2x1@64:gspo_corrected"]
ALL_MASKED = ["1x1x1@64:all_masked", "1x2x1@64:all_masked"]
EVEN_MASKED = "1x1x1@64:even_masked"  # the first of two data-parallel ranks has nothing left
# Under virtual stages eight rows, then one, which is filled up to two.
TWO_RANKS = ["1x1x1@64", "2x1x1@64", "2x1x1s@64", "2x1x1si@64", "1x2x1@64", "1x2x1u@64"]
TWO_RANKS += [
    "2x1x1i@4096p",
    "1x2x1@4096p",
    "1x2x1v@64",
    "1x2x1v@4096",
    "1x1x2@64",
    "1x1x2@4096",
    "1x1x2@0",
]
FOUR_RANKS = ["2x1x2@64", "2x1x2si@64", "1x2x2v@64", "2x2x1siv@64", "1x1x2@64", "1x1x4@64"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Four layers, for two virtual stages on two ranks."""
    directory = tmp_path_factory.mktemp("four_layers")
    make_tiny_model(directory, corpus_texts(), num_layers=4)
    return directory


@pytest.fixture(scope="module")
def found(model, run_ranks, tmp_path_factory):
    out = tmp_path_factory.mktemp("updates")
    run_ranks(
        SCRIPT,
        1,
        model,
        out / "one.json",
        *(ONE, SPLIT, ALONE, *SHARED, FROZEN, ADAPTED, *OF_ONE, f"{ONE}:even_masked"),
    )
    others = [*FROZEN_OTHERS, *ADAPTED_OTHERS, *OF_TWO, *ALL_MASKED, EVEN_MASKED]
    run_ranks(SCRIPT, 2, model, out / "two.json", *TWO_RANKS, *others, timeout=500)
    one, two = (json.loads((out / f"{n}.json").read_text()) for n in ("one", "two"))
    one["initial"] = {"weights": initial_weights(model)}
    return {**one, **{f"2 ranks {name}": value for name, value in two.items()}}


def initial_weights(directory):
    with safe_open(directory / "model.safetensors", framework="pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}
    return {n: [float(w.double().sum()), float(w.abs().max())] for n, w in weights.items()}


OTHERS = [SPLIT, ALONE, *SHARED, *(f"2 ranks {name}" for name in TWO_RANKS)]


def check_numbers(found, expected):
    for one, other in zip(expected["updates"], found["updates"], strict=True):
        assert other.keys() == one.keys()
        for name in one:
            assert other[name] == pytest.approx(one[name], rel=2e-5, abs=2e-6), name


def check_logprobs(found, expected):
    for when, bound in (("before", 1e-5), ("after", 1e-4)):
        for one, other in zip(expected[when], found[when], strict=True):
            np.testing.assert_allclose(other, one, atol=bound)


def check_weights(found, expected):
    assert list(found["weights"]) == list(expected["weights"])
    for name, one in expected["weights"].items():
        np.testing.assert_allclose(found["weights"][name], one, rtol=1e-4, atol=2e-3, err_msg=name)


@pytest.mark.parametrize("layout", OTHERS)
def test_loss_and_gradients_are_those_of_one_process(found, layout):
    check_numbers(found[layout], found[ONE])


@pytest.mark.parametrize("layout", OF_TWO)
def test_each_objective_is_that_of_one_process(found, layout):
    one, two = found[f"{ONE}:{layout.partition(':')[2]}"], found[f"2 ranks {layout}"]
    check_numbers(two, one)
    check_weights(two, one)


@pytest.mark.field
@pytest.mark.parametrize("layout", ALL_MASKED)
def test_an_update_with_every_token_masked_is_skipped_by_all_ranks(found, layout):
    values = found[f"2 ranks {layout}"]
    assert values["weights"] == found["initial"]["weights"]
    assert values["after"] == values["before"]
    for update in values["updates"]:
        assert (update["skipped_updates"], update["mismatch/masked_share"]) == (1, 1)
        assert "loss" not in update and "grad_norm" not in update and "reference_kl" not in update


@pytest.mark.field
def test_a_rank_with_every_token_masked_takes_part_in_the_others_update(found):
    one, two = found[f"{ONE}:even_masked"], found[f"2 ranks {EVEN_MASKED}"]
    check_numbers(two, one)
    check_weights(two, one)
    first = two["updates"][0]
    assert (first["mismatch/num_masked_sequences"], first["skipped_updates"]) == (6, 0)
    assert two["weights"] != found["initial"]["weights"]


def test_objectives_differ_and_their_parts_are_at_work(found):
    first = {name: found[f"{ONE}:{name}"]["updates"][0] for name in OBJECTIVES}
    first["token_mean"] = found[ONE]["updates"][0]
    norms = [values["grad_norm"] for values in first.values()]
    assert len({round(norm, 4) for norm in norms}) == len(norms)
    for name in ("gspo_corrected", "token_corrected"):
        assert 0 < first[name]["mismatch/num_masked_sequences"] < 11
        assert 0 < first[name]["importance/weight"] != 1
    assert 0 < first["gspo"]["clipped_share"] < 1


@pytest.mark.parametrize("layout", OTHERS)
def test_logprobs_are_those_of_one_process_before_and_after_updates(found, layout):
    check_logprobs(found[layout], found[ONE])


@pytest.mark.parametrize("layout", OTHERS)
def test_updated_weights_are_those_of_one_process(found, layout):
    check_weights(found[layout], found[ONE])


@pytest.mark.slow
def test_four_ranks_give_what_one_does(found, model, run_ranks, tmp_path):
    run_ranks(SCRIPT, 4, model, tmp_path / "four.json", *FOUR_RANKS, timeout=600)
    four = json.loads((tmp_path / "four.json").read_text())
    assert list(four) == FOUR_RANKS
    for layout, values in four.items():
        for check in (check_numbers, check_logprobs, check_weights):
            check(values, found[ONE])
        assert values["reference_gap"] == values["restored_gap"] == 0.0, layout


def test_updates_change_the_logprobs_and_the_reference_keeps_the_old_ones(found):
    for layout, values in found.items():
        if layout == "initial" or layout.endswith("all_masked"):
            continue
        moved = np.concatenate(values["after"]) - np.concatenate(values["before"])
        assert np.abs(moved).max() > 1e-2, layout
        assert values["reference_gap"] == 0.0, layout
        assert values["restored_gap"] == 0.0, layout


def test_frozen_tower_keeps_its_weights_and_the_rest_learns_under_any_layout(found):
    frozen = found[FROZEN]
    for name, value in frozen["weights"].items():
        moved = value != found["initial"]["weights"][name]
        assert moved == (not name.startswith("visual.")), name
    for layout in FROZEN_OTHERS:
        check_weights(found[f"2 ranks {layout}"], frozen)


@pytest.mark.parametrize("layout", ADAPTED_OTHERS)
def test_updates_of_adapters_are_those_of_one_process(found, layout):
    for check in (check_numbers, check_logprobs, check_weights):
        check(found[f"2 ranks {layout}"], found[ADAPTED])


@pytest.mark.slow
def test_updates_of_adapters_are_those_of_one_process_under_all_layouts(
    found, model, run_ranks, tmp_path
):
    run_ranks(SCRIPT, 2, model, tmp_path / "two.json", *MORE_ADAPTED)
    four = [f"{layout}a" for layout in FOUR_RANKS]
    run_ranks(SCRIPT, 4, model, tmp_path / "four.json", *four, timeout=600)
    for name in ("two", "four"):
        for layout, values in json.loads((tmp_path / f"{name}.json").read_text()).items():
            for check in (check_numbers, check_logprobs, check_weights):
                check(values, found[ADAPTED])
            assert values["reference_gap"] == values["restored_gap"] == 0.0, layout
