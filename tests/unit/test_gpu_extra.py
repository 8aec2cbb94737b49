"""The packages of the `gpu` extra fit together for Python 3.12, as a package index has them today.

Nothing is installed: pip only resolves. Not covered: Transformer Engine, which pip would have to
build, and whether the packages run.
"""

import json
import subprocess
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parents[2]


def interpreters():
    """Interpreters of Python 3.12: on the path, or installed by pyenv."""
    installed = Path.home().glob(".pyenv/versions/3.12*/bin/python")
    for candidate in ["python3.12", *map(str, sorted(installed))]:
        try:
            subprocess.run([candidate, "-c", "import venv"], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            continue
        yield candidate


@pytest.mark.slow
def test_the_gpu_extra_resolves_for_python_3_12(tmp_path):
    python = next(interpreters(), None)
    if python is None:
        pytest.skip("no Python 3.12")
    subprocess.run([python, "-m", "venv", tmp_path / "env"], check=True)
    pip = [tmp_path / "env" / "bin" / "python", "-m", "pip", "install", "--dry-run", "--quiet"]
    report = tmp_path / "report.json"
    done = subprocess.run(
        [*pip, "--report", report, f"{ROOT}[gpu]"], capture_output=True, text=True, timeout=3600
    )
    if "Could not find a version" in done.stderr and "from versions: none" in done.stderr:
        pytest.skip(f"no package index: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr[-2000:]
    found = [item["metadata"] for item in json.loads(report.read_text())["install"]]
    versions = {each["name"].lower().replace("_", "-"): each["version"] for each in found}
    assert (versions["torch"], versions["vllm"]) == ("2.13.0", "0.32.0")
    # Before 0.17 Megatron-Core asks for a Transformer Engine that the `te` extra need not take.
    assert SpecifierSet(">=0.17,<0.20").contains(versions["megatron-core"])
