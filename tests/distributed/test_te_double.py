"""The Transformer Engine spec by its names and shapes, on a test double of the fused layers.

Megatron-Core's own Transformer Engine classes are built on `tests/te_double` in place of the real
package: the mapping in its second spelling (`linear_qkv.layer_norm_weight`), the sharding, the
borders handed to the attention and what each rank sums are the real ones. So are FP8's recipes as
Megatron-Core makes them and the regions that it enters. The kernels are torch's: bfloat16, what FP8
computes, cuDNN's attention, context parallelism and speed are not covered; tests/gpu has what needs
a GPU.
"""

import os
from pathlib import Path

import pytest
import torch

from tests.model_cases import write_case

SCRIPT = Path(__file__).parent / "ranks" / "te_layouts.py"
DOUBLE = Path(__file__).resolve().parents[1] / "te_double"


def with_double():
    """An environment with the double on the path."""
    paths = [str(DOUBLE), str(DOUBLE.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(paths)}


@pytest.mark.parametrize(
    ("num_ranks", "layouts"), [(2, ("1x1x1", "2x1x1", "2x1x1s", "1x2x1"))], ids=["2 ranks"]
)
def test_fused_layers_compute_what_local_ones_do(num_ranks, layouts, tmp_path, run_ranks):
    for seed in (0, 3):  # tied and untied
        _, rows = write_case(tmp_path / f"{seed:02d}", seed)
        torch.save(rows, tmp_path / f"{seed:02d}" / "samples.pt")
    done = run_ranks(SCRIPT, num_ranks, tmp_path, *layouts, env=with_double(), timeout=300)
    assert f"SAME {2 * len(layouts)} models" in done.stdout


def test_fp8_is_in_the_language_models_layers_under_the_asked_recipe_alone(tmp_path, run_ranks):
    _, rows = write_case(tmp_path, 4)  # four layers
    torch.save(rows, tmp_path / "samples.pt")
    script = SCRIPT.with_name("te_fp8.py")
    done = run_ranks(script, 1, tmp_path, env=with_double())
    assert "FP8 as asked in 20 models" in done.stdout


def test_fp8_takes_any_number_of_rows_and_keeps_no_scales_without_gradients(tmp_path, run_ranks):
    write_case(tmp_path, 4)
    script = SCRIPT.with_name("te_fp8_rows.py")
    done = run_ranks(script, 2, tmp_path, env=with_double())
    assert done.stdout.count("PASSED") == 2 * 4
