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

SCRIPT = Path(__file__).parent / "model_layouts.py"


@pytest.fixture(scope="module")
def write_cases(tmp_path_factory):
    def write(seeds):
        directory = tmp_path_factory.mktemp("cases")
        for seed in seeds:
            _, rows = write_case(directory / f"{seed:02d}", seed)
            torch.save(rows, directory / f"{seed:02d}" / "samples.pt")
        return directory

    return write


TWO = ["2,1,1,", "2,1,1,s", "2,1,1,i", "2,1,1,si", "1,2,1,", "1,2,1,u", "1,2,1,v", "1,1,2,"]
FOUR = ["2,2,1,", "2,2,1,s", "2,1,2,", "2,1,2,s", "2,1,2,i", "2,2,1,iv", "1,2,2,v", "1,1,4,"]


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
