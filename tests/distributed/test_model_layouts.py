"""The layout changes nothing: logits, loss and gradients under TP, SP, PP and CP are one process's.

Each rank compares its own copy of replicated parameters, so a gradient that is whole on one rank
only is seen. Micro-batches go through Megatron's schedules and gradients through its
`finalize_model_grads`; one of the rows is text alone. Data parallelism is covered by
test_updates.py.
"""

from pathlib import Path

import pytest
import torch

from tests.model_cases import write_case

SCRIPT = Path(__file__).parent / "ranks" / "model_layouts.py"


@pytest.fixture(scope="module")
def write_cases(tmp_path_factory):
    def write(seeds):
        directory = tmp_path_factory.mktemp("cases")
        for seed in seeds:
            _, rows = write_case(directory / f"{seed:02d}", seed)
            torch.save(rows, directory / f"{seed:02d}" / "samples.pt")
        return directory

    return write


TWO = ["2x1x1", "2x1x1s", "2x1x1i", "2x1x1si", "1x2x1", "1x2x1u", "1x2x1v", "1x1x2"]
FOUR = ["2x2x1", "2x2x1s", "2x1x2", "2x1x2s", "2x1x2i", "2x2x1iv", "1x2x2v", "1x1x4"]


def test_two_ranks_compute_what_one_does_under_each_kind_of_parallelism(write_cases, run_ranks):
    # Among them tied and untied embeddings, and vocabularies that do not divide and are padded.
    done = run_ranks(SCRIPT, 2, write_cases(range(6)), *TWO, timeout=300)
    assert "CHECKED 38 layouts" in done.stdout


@pytest.mark.slow
def test_two_ranks_compute_what_one_does_on_twenty_models(write_cases, run_ranks):
    done = run_ranks(SCRIPT, 2, write_cases(range(20)), *TWO, timeout=600)
    assert "CHECKED 132 layouts" in done.stdout


@pytest.mark.slow
def test_four_ranks_compute_what_one_does_under_two_kinds_together(write_cases, run_ranks):
    done = run_ranks(SCRIPT, 4, write_cases(range(6)), *FOUR, timeout=600)
    assert "CHECKED 38 layouts" in done.stdout
