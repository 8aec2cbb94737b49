"""The Transformer Engine spec by its names and shapes, on a test double of the fused layers.

Megatron-Core's own Transformer Engine classes are built on `tests/te_double` in place of the real
package: the mapping in its second spelling (`linear_qkv.layer_norm_weight`), the sharding, the
borders handed to the attention and what each rank sums are the real ones. The kernels are torch's:
bfloat16, FP8, cuDNN's attention, context parallelism and speed are not covered; tests/gpu has what
needs a GPU.
"""

import os
from pathlib import Path

import pytest
import torch

from tests.model_cases import write_case

SCRIPT = Path(__file__).parent / "te_layouts.py"
DOUBLE = Path(__file__).resolve().parents[1] / "te_double"


@pytest.mark.parametrize(
    ("num_ranks", "layouts"), [(2, ("1,1,", "2,1,", "2,1,s", "1,2,"))], ids=["2 ranks"]
)
def test_fused_layers_compute_what_local_ones_do(num_ranks, layouts, tmp_path, run_ranks):
    for seed in (0, 3):  # tied and untied
        _, rows = write_case(tmp_path / f"{seed:02d}", seed)
        torch.save(rows, tmp_path / f"{seed:02d}" / "samples.pt")
    root = DOUBLE.parents[1]
    paths = [str(DOUBLE), str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {"PYTHONPATH": os.pathsep.join(paths)}
    done = run_ranks(SCRIPT, num_ranks, tmp_path, *layouts, env=environment, timeout=300)
    assert f"SAME {2 * len(layouts)} models" in done.stdout
