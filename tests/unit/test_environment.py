"""The environment that `make env` creates, also for programs that do not import this project."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

pytestmark = pytest.mark.field

ROOT = Path(__file__).resolve().parents[2]
STOCK = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        assert name.partition(".")[0] != "megatron_sr1", name
sys.meta_path.insert(0, Refuse())
"""


def test_an_exported_model_loads_with_stock_transformers_as_the_guide_shows(tiny_model, tmp_path):
    guide = (ROOT / "docs" / "quickstart.md").read_text()
    (block,) = re.findall(r"^```python\n(.*?)^```$", guide, re.MULTILINE | re.DOTALL)
    (tmp_path / "runs" / "demo" / "cold_start").mkdir(parents=True)
    (tmp_path / "runs" / "demo" / "cold_start" / "hf").symlink_to(tiny_model)
    Image.new("RGB", (84, 56), "white").save(tmp_path / "digits.png")
    done = subprocess.run(
        [sys.executable, "-c", STOCK + block], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "Which digits?" in done.stdout and done.stdout.count("<|image_pad|>") == 6


def fake_environment(directory: Path, fails: str) -> tuple[str, Path]:
    """A python whose torchvision fails with this message until one of its modules is empty."""
    package = directory / "lib" / "python3.11" / "site-packages" / "torchvision"
    package.mkdir(parents=True)
    for name in ("_meta_registrations", "_autograd_registrations"):
        (package / f"{name}.py").write_text("needs_compiled_operators()\n")
    (directory / "bin").mkdir()
    python = directory / "bin" / "python"
    meta = package / "_meta_registrations.py"
    test = f"grep -q needs {meta}" if fails else "false"
    python.write_text(f"#!/bin/sh\nif {test}; then echo '{fails}' >&2; exit 1; fi\n")
    python.chmod(0o755)
    return str(python), meta


@pytest.mark.parametrize(
    ("fails", "emptied"),
    [
        ("", False),
        ("RuntimeError: operator torchvision::nms does not exist", True),
        ("ImportError: libjpeg.so.8: cannot open shared object file", False),
    ],
)
def test_torchvision_is_patched_only_where_its_operators_are_missing(tmp_path, fails, emptied):
    python, module = fake_environment(tmp_path, fails)
    program = f"import make_env; make_env.patch_torchvision({python!r})"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT / "tools", check=True)
    assert ("needs" not in module.read_text()) == emptied


IN_AN_ENVIRONMENT_MADE_BY_PIP = """
import sys
class Fail:
    def find_spec(self, name, path=None, target=None):
        if name in ("torchvision._meta_registrations", "torchvision._autograd_registrations"):
            raise RuntimeError("operator torchvision::nms does not exist")
sys.meta_path.insert(0, Fail())
from megatron_sr1.runtime.cpu import patch_torchvision
patch_torchvision()
patch_torchvision()
assert sys.modules["torchvision._meta_registrations"].__spec__ is None
from torchvision.transforms.v2 import functional
"""


def test_our_processes_import_a_torchvision_that_fails_as_pip_installs_it():
    done = subprocess.run(
        [sys.executable, "-c", IN_AN_ENVIRONMENT_MADE_BY_PIP],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
