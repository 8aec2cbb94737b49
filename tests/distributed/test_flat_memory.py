"""A long run needs no more memory at its end than at its beginning.

Not covered: a GPU's memory; the other ranks (they do the same).
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_sr1.observability.metrics import read_lines

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_200_steps_of_the_demo_leave_host_memory_where_step_20_found_it(demo, tmp_path):
    config, output = demo / "vision_sr1" / "config.json", tmp_path / "run"
    command = [sys.executable, "-m", "megatron_sr1", "train", str(config), f"output={output}"]
    command += ["optimizer.num_steps=200", "checkpoint.export_hf=false", "evaluation.sets="]
    command += ["evaluation.every_steps=0", "evaluation.at_start=false"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, cwd=ROOT, env=environment, timeout=3000)
    gib = [line["memory/host_gib"] for line in read_lines(output / "metrics.jsonl")]
    assert len(gib) == 200 and gib[19] > 0.5
    # Resident memory holds what malloc keeps for later: the least of 20 steps is what is in use.
    assert min(gib[180:]) == pytest.approx(min(gib[19:39]), rel=0.02)
