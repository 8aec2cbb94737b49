"""The doctor: what it reads, and that it knows the traps."""

import ast
import subprocess
import sys
from importlib import metadata
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


@pytest.mark.field
def test_the_doctor_and_the_setup_want_the_same_packages():
    needed = doctor.needed()
    assert {"pyarrow", "psutil", "torch-optimi"} < set(needed) and "webdataset" not in needed
    found = {name: Requirement(f"{name}{needed[name]}").specifier for name in needed}
    assert found == {name: r.specifier for name, r in core_requirements().items()}


@pytest.mark.field
def test_the_doctor_itself_needs_none_of_them_but_packaging():
    program = "import sys\n"
    for name in ("psutil", "pyarrow", "torch", "omegaconf", "transformers", "numpy"):
        program += f"sys.modules[{name!r}] = None\n"
    program += "import megatron_sr1.cli, megatron_sr1.doctor"
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.field
@pytest.mark.parametrize("name", ["README.md", "docs/scaling.md", "examples/Dockerfile"])
def test_the_commands_that_install_for_gpus_are_the_doctors(name):
    lines = [line for line in (ROOT / name).read_text().splitlines() if "pip install" in line]
    gpu, te = (
        [i for i, line in enumerate(lines) if f"[{extra}]" in line] for extra in ("gpu", "te")
    )
    assert len(gpu) == len(te) == 1 and gpu < te
    assert lines[gpu[0]].strip(" &").endswith(doctor.INSTALL_GPU)
    assert lines[te[0]].strip(" &").endswith(doctor.INSTALL_TE)


@pytest.mark.field
def test_transformer_engine_is_an_extra_of_its_own():
    extras = {}
    for node in ast.walk(ast.parse((ROOT / "setup.py").read_text())):
        if isinstance(node, ast.keyword) and node.arg == "extras_require":
            extras = ast.literal_eval(node.value)
    holding = [name for name, those in extras.items() if "transformer-engine" in " ".join(those)]
    assert holding == ["te"]


@pytest.mark.field
def test_the_doctor_says_how_transformer_engine_is_installed():
    assert doctor.INSTALL_TE in doctor._transformer_engine(None, True, "").advice
    broken = doctor._transformer_engine("2.20.2", True, "ImportError: undefined symbol")
    assert broken.level == "warn" and "undefined symbol" in broken.found
    assert doctor.INSTALL_TE in broken.advice
    assert "No module named" in doctor._import_problem("not_a_module_of_anyone")
    assert doctor._import_problem("json") == ""


def test_this_environment_can_train():
    text, can_train = doctor.examine()
    assert can_train and text.endswith("Ready to train.")
    for name in ("torch", "megatron-core", "vllm", "Transformer Engine", "apex", "cpu"):
        assert name in text


def test_a_missing_package_fails_and_says_what_to_do(monkeypatch):
    monkeypatch.setattr(doctor, "needed", lambda: {"not-a-package-of-anyone": ">=1"})
    text, can_train = doctor.examine()
    assert not can_train
    assert "[ FAIL ] not-a-package-of-anyone" in text and "-> make env" in text


def test_missing_metadata_of_the_project_is_reported(monkeypatch):
    def nothing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", nothing)
    found = {finding.name: finding for finding in doctor._packages()}
    assert found["megatron_sr1"].level == "fail" and "make env" in found["megatron_sr1"].advice


def test_an_unsupported_version_fails(monkeypatch):
    monkeypatch.setattr(doctor, "needed", lambda: {"rich": ">=1000"})
    text, can_train = doctor.examine()
    assert not can_train and "supported is >=1000" in text


@pytest.mark.parametrize(
    ("folders", "kind"),
    [(["apex/normalization"], "nvidia"), (["apex/lib"], "namesake"), ([], "none")],
)
def test_nvidias_apex_is_distinguished_from_its_namesake(tmp_path, folders, kind):
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
