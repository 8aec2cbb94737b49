"""The packages of the `gpu` extra fit together for Python 3.12, as a package index has them today.

Nothing of the extra is installed: pip, where there is a Python 3.12, and uv only resolve. Not
covered: Transformer Engine, which pip would have to build, and whether the packages run.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
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


def resolving(command):
    """What `command` prints; the test is skipped where no package index is reached."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600)
    unreached = ["Could not find a version", "from versions: none"], ["Failed to fetch"]  # pip, uv
    if any(all(words in done.stderr for words in said) for said in unreached):
        pytest.skip(f"no package index: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def versions_by_pip(folder):
    """Name -> version of a dry run of pip, under a Python 3.12."""
    python = next(interpreters(), None)
    if python is None:
        pytest.skip("no Python 3.12")
    subprocess.run([python, "-m", "venv", folder / "env"], check=True)
    pip = [folder / "env" / "bin" / "python", "-m", "pip", "install", "--dry-run", "--quiet"]
    resolving([*pip, "--report", folder / "report.json", f"{ROOT}[gpu]"])
    found = json.loads((folder / "report.json").read_text())["install"]
    return {each["metadata"]["name"]: each["metadata"]["version"] for each in found}


def versions_by_uv(folder):
    """Name -> version as uv resolves them, which needs no Python 3.12 for it."""
    subprocess.run([sys.executable, "-m", "venv", folder / "env"], check=True)
    resolving([folder / "env" / "bin" / "python", "-m", "pip", "install", "--quiet", "uv"])
    options = ["--python-version", "3.12", "--extra", "gpu", "--no-annotate", "--no-header"]
    lines = resolving(
        [folder / "env" / "bin" / "uv", "pip", "compile", *options, ROOT / "setup.py"]
    )
    pins = map(Requirement, lines.splitlines())
    return {pin.name: next(iter(pin.specifier)).version for pin in pins}


@pytest.mark.slow
@pytest.mark.parametrize("resolved_versions", [versions_by_pip, versions_by_uv])
def test_the_gpu_extra_resolves_for_python_3_12(resolved_versions, tmp_path):
    found = resolved_versions(tmp_path)
    versions = {name.lower().replace("_", "-"): version for name, version in found.items()}
    assert (versions["torch"], versions["vllm"]) == ("2.13.0", "0.32.0")
    # Before 0.17 Megatron-Core asks for a Transformer Engine that the `te` extra need not take.
    assert SpecifierSet(">=0.17,<0.20").contains(versions["megatron-core"])
