"""The layout changes nothing of adapters: PEFT's logits, loss, gradients and merge under each.

Gradients go through Megatron's schedules and its `finalize_model_grads`; each rank compares its
own copy of what is replicated. Fused layers are those of test_te_double.py.
"""

from pathlib import Path

import pytest
import torch

from megatron_sr1.checkpoint.adapters import initial_value
from megatron_sr1.checkpoint.mapping import adapter_entries, canonical_hf_name
from megatron_sr1.model.hf_config import read_hf_config
from tests.adapter_cases import logits_of, published, reference_logprobs, write_adapted
from tests.distributed.ranks.model_layouts import TEMPERATURE
from tests.distributed.test_te_double import with_double
from tests.model_cases import make_row

SCRIPT = Path(__file__).parent / "ranks" / "adapter_layouts.py"
TWO = ["2x1x1", "2x1x1s", "2x1x1si", "1x2x1", "1x2x1u", "1x2x1v", "1x1x2", "1x1x1"]
DROPOUT = ["2x1x1-dropout", "2x1x1s-dropout", "2x1x1si-dropout"]
RECOMPUTED = ["2x1x1s-selective", "2x1x1s-full", "1x2x1-full", "1x2x1-selective"]
FOUR = ["2x2x1s", "2x1x2si", "2x2x1iv", "1x2x2v", "1x1x4"]


@pytest.fixture(scope="module")
def write_cases(tmp_path_factory):
    def write(seeds):
        directory = tmp_path_factory.mktemp("adapted")
        for seed in seeds:
            write_adapted_case(directory / f"{seed:02d}", seed)
        return directory

    return write


def write_adapted_case(directory, seed):
    """A model with PEFT's logits, loss and gradients for the rows that a rank computes."""
    peft, rows, settings, tensors = write_adapted(directory, seed)
    with torch.no_grad():
        logits = [[logits_of(peft, [sample]) for sample in row] for row in rows]
    losses = []
    for row in [*rows, rows[0]]:
        packed = make_row(row)
        logprobs = reference_logprobs(peft, row, TEMPERATURE)
        losses.append(((logprobs * packed.loss_mask).sum(), packed.loss_mask.sum()))
    total, tokens = (sum(parts) for parts in zip(*losses, strict=True))
    (total / tokens).backward()
    gradients = {published(n): p.grad for n, p in peft.named_parameters() if p.requires_grad}
    merged = peft.merge_and_unload().state_dict()
    named = {canonical_hf_name(name): value for name, value in merged.items()}
    if read_hf_config(directory).tie_word_embeddings:
        del named["lm_head.weight"]
    entries = adapter_entries(read_hf_config(directory), settings.targets, settings.rank)
    case = {
        "settings": settings,
        "tensors": tensors,
        "rows": rows,
        "logits": logits,
        "loss": total.detach(),
        "gradients": gradients,
        "merged": named,
        "initial": {
            e.hf_names[0]: initial_value(e, settings, seed=1) for p in entries.values() for e in p
        },
    }
    torch.save(case, directory / "case.pt")


def test_two_ranks_compute_what_peft_does(write_cases, run_ranks):
    done = run_ranks(SCRIPT, 2, write_cases([1, 2]), "local", "2x1x1s", "1x2x1", "1x1x2")
    assert "CHECKED 6 layouts" in done.stdout


@pytest.mark.slow
def test_twelve_models_compute_what_peft_does_under_every_layout_of_two_ranks(
    write_cases, run_ranks
):
    done = run_ranks(
        SCRIPT, 2, write_cases(range(12)), "local", *TWO, *RECOMPUTED, *DROPOUT, timeout=900
    )
    assert "CHECKED" in done.stdout


@pytest.mark.slow
def test_four_ranks_compute_what_peft_does_under_two_kinds_together(write_cases, run_ranks):
    done = run_ranks(SCRIPT, 4, write_cases(range(4)), "local", *FOUR, timeout=900)
    assert "CHECKED" in done.stdout


@pytest.mark.slow
def test_fused_layers_with_adapters_compute_what_peft_does(write_cases, run_ranks):
    layouts = ["1x1x1", "2x1x1", "2x1x1s", "1x2x1"]
    cases = write_cases(range(4))
    done = run_ranks(
        SCRIPT, 2, cases, "transformer_engine", *layouts, env=with_double(), timeout=600
    )
    assert "CHECKED" in done.stdout
