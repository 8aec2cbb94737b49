"""What several modules of this folder share: one run of the demo for each seed."""

import functools
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def demo_of(tmp_path_factory):
    """Seed -> output folder of `megatron-sr1 demo`; takes minutes, once for each seed."""

    @functools.cache
    def run(seed):
        output = tmp_path_factory.mktemp(f"demo_{seed}_")
        command = [sys.executable, "-m", "megatron_sr1", "demo", "--output", str(output)]
        with open(output / "terminal.txt", "w") as said:
            subprocess.run(
                [*command, "--seed", str(seed)],
                check=True,
                cwd=ROOT,
                timeout=1500,
                stdout=said,
                stderr=subprocess.STDOUT,
            )
        return output

    return run


@pytest.fixture(scope="session")
def demo(demo_of):
    """Output folder of the demo with its default seed, 1."""
    return demo_of(1)
