"""What several modules of this folder share: one run of the demo."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """Output folder of `megatron-sr1 demo`; takes minutes."""
    output = tmp_path_factory.mktemp("demo")
    command = [sys.executable, "-m", "megatron_sr1", "demo", "--output", str(output)]
    subprocess.run(command, check=True, cwd=ROOT, timeout=1500)
    return output
