"""The table of `make layouts`; every layout within its bound."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.distributed.ranks.layout_table import worst

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_every_layout_is_in_the_table_with_gaps_within_the_bound():
    command = [sys.executable, "tools/layouts.py"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=1800, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "| TP2 + SP x PP2 x VPP2 | 8 |" in done.stdout
    assert "104 of 104 within 1e-05" in done.stdout


def test_the_farthest_tensor_is_named_and_nothing_hides_behind_nan():
    expected = {"a": torch.tensor([3.0, 4.0]), "b": torch.ones(2)}
    gap = worst({"a": torch.tensor([3.0, 4.5]), "b": torch.ones(2)}, expected)
    assert (gap.tensor, gap.value) == ("a", pytest.approx(0.1))
    gap = worst({"a": torch.tensor([3.0, 9.0]), "b": torch.tensor([1.0, float("nan")])}, expected)
    assert gap.tensor == "b"
