"""The doctor: what it reads, and that it knows the traps."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from megatron_sr1 import doctor

ROOT = Path(__file__).resolve().parents[2]


def core_requirements() -> dict[str, Requirement]:
    for node in ast.walk(ast.parse((ROOT / "setup.py").read_text())):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "CORE":
            return {(r := Requirement(text)).name: r for text in ast.literal_eval(node.value)}
    raise AssertionError("setup.py has no CORE")


def test_the_doctor_and_the_setup_want_the_same_versions():
    core = core_requirements()
    for name, supported in doctor.NEEDED.items():
        assert Requirement(f"{name}{supported}").specifier == core[name].specifier, name


def test_this_environment_can_train():
    text, can_train = doctor.examine()
    assert can_train and text.endswith("Ready to train.")
    for name in ("torch", "megatron-core", "vllm", "Transformer Engine", "apex", "cpu"):
        assert name in text


def test_a_missing_package_fails_and_says_what_to_do(monkeypatch):
    monkeypatch.setitem(doctor.NEEDED, "not-a-package-of-anyone", ">=1")
    text, can_train = doctor.examine()
    assert not can_train
    assert "[ FAIL ] not-a-package-of-anyone" in text and "-> make env" in text


def test_an_unsupported_version_fails(monkeypatch):
    monkeypatch.setitem(doctor.NEEDED, "rich", ">=1000")
    text, can_train = doctor.examine()
    assert not can_train and "supported is >=1000" in text


@pytest.mark.parametrize(
    ("folders", "kind"),
    [(["apex/normalization"], "nvidia"), (["apex/lib"], "namesake"), ([], "none")],
)
def test_nvidias_apex_is_told_from_its_namesake(tmp_path, folders, kind):
    for folder in folders:
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "__init__.py").touch()
        (tmp_path / "apex" / "__init__.py").touch()
    program = "from megatron_sr1.doctor import apex_kind; print(apex_kind())"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {program}"],
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == kind, done.stderr
