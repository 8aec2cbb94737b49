"""The structure of the package, read from its syntax trees: layers, lazy imports, file sizes."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "megatron_sr1"
FILES = sorted(PACKAGE.rglob("*.py"))
LAYER = {
    "config": 0,
    "records": 0,
    "errors": 0,
    "runtime": 1,
    "checkpoint": 3,
    "rollout": 4,
    "planning": 4,
    "conversion": 4,
    "report": 4,
}
LAYER |= dict.fromkeys(("model", "data", "rewards", "algorithm", "observability"), 2)
LAYER |= {"trainer": 5, "evaluation": 6, "dry_run": 6, "stages": 7, "cli": 9, "__main__": 9}
LAYER |= dict.fromkeys(
    ("demo", "gpu_checks", "launch", "doctor", "doctor_distributed", "parser", "show"), 8
)
LAZY = {
    "vllm": {"rollout/vllm_api.py", "rollout/weight_sync.py"},
    "wandb": {"observability/wandb_sink.py"},
    "tensorboard": {"observability/tensorboard_sink.py"},
    "transformer_engine": 1,
    "nemo_run": {"launch/slurm.py"},
    "datasets": {"data/sources.py"},
    "huggingface_hub": {"runtime/hub.py"},
    "openai": {"runtime/chat.py"},
    "plotly": {"report/page.py"},
}
"""Library -> the files that may import it, inside functions; a number allows that many files."""
MAX_LINES = 500


def package_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(tree: ast.AST) -> Iterator[tuple[str, ast.stmt]]:
    """Dotted names of all imports, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            # `from megatron_sr1 import data` imports the package data.
            yield from ((f"{node.module}.{alias.name}", node) for alias in node.names)


def problems_of_layers(package: str, source: str) -> list[str]:
    found = []
    for name, node in imports(ast.parse(source)):
        parts = name.split(".")
        if parts[0] != "megatron_sr1":
            continue
        other = parts[1]
        if other not in LAYER:
            found.append(f"line {node.lineno}: {other} is not a known package")
        elif (
            other != package and LAYER[other] >= LAYER[package] and LAYER[package] not in (0, 8, 9)
        ):
            found.append(f"line {node.lineno}: {package} imports {other}")
        elif LAYER[other] > LAYER[package]:
            found.append(f"line {node.lineno}: {package} imports upward from {other}")
    return found


def shown(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


@pytest.mark.parametrize("path", FILES, ids=shown)
def test_a_package_imports_only_from_lower_layers(path):
    package = package_of(path)
    if package == "__init__":
        return
    assert package in LAYER, f"{package} has no layer: give it one in CONTRIBUTING.md and here"
    assert problems_of_layers(package, path.read_text()) == []


@pytest.mark.parametrize(
    ("package", "source"),
    [
        ("data", "from megatron_sr1.stages import run_sft"),
        ("data", "def f():\n    import megatron_sr1.rewards.score"),
        ("model", "from megatron_sr1 import algorithm"),
        ("runtime", "from megatron_sr1.model import flops"),
        ("records", "from megatron_sr1.runtime import rng"),
        ("checkpoint", "from megatron_sr1.rollout import engine"),
        ("evaluation", "from megatron_sr1.demo.digits import make_digits"),
        ("trainer", "from megatron_sr1 import cli"),
    ],
)
def test_the_check_finds_a_wrong_import(package, source):
    assert problems_of_layers(package, source) != []


@pytest.mark.parametrize(
    ("package", "source"),
    [
        ("trainer", "from megatron_sr1.trainer.step import update"),
        ("rollout", "from megatron_sr1.model.hf_config import read_hf_config"),
        ("config", "from megatron_sr1.errors import ConfigError"),
        ("launch", "from megatron_sr1.config.run import Config"),
        ("launch", "from megatron_sr1.runtime.signals import end_with"),
    ],
)
def test_the_check_accepts_a_right_import(package, source):
    assert problems_of_layers(package, source) == []


def test_starting_ranks_imports_neither_torch_nor_other_training_libraries():
    """`launch/` also runs in nemo-run's environment, and before `launch.device=cpu` hides GPUs."""
    names = sorted(f"megatron_sr1.launch.{path.stem}" for path in (PACKAGE / "launch").glob("*.py"))
    program = (
        f"import importlib, sys\nfor name in {names}: importlib.import_module(name)\n"
        "print(sorted({'torch', 'numpy', 'psutil', 'megatron', 'vllm'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_conversion_imports_no_megatron():
    names = sorted(f"megatron_sr1.conversion.{p.stem}" for p in PACKAGE.glob("conversion/[!_]*.py"))
    program = (
        f"import importlib, sys\nfor name in {names}: importlib.import_module(name)\n"
        "print(sorted({'megatron.core', 'transformers', 'vllm'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "") and len(names) > 3


def test_the_trainer_does_not_import_the_planner():
    trainer = [path for path in FILES if package_of(path) == "trainer"]
    planned = {
        shown(path)
        for path in trainer
        for name, _ in imports(ast.parse(path.read_text()))
        if name.startswith("megatron_sr1.planning")
    }
    assert planned == set()


def test_heavy_libraries_are_imported_lazily_in_their_files_only():
    found: dict[str, set[str]] = {library: set() for library in LAZY}
    for path in FILES:
        tree = ast.parse(path.read_text())
        at_top = {id(node) for node in tree.body}
        for name, node in imports(tree):
            library = name.split(".")[0]
            if library in LAZY:
                found[library].add(shown(path))
                assert id(node) not in at_top, f"{shown(path)}: {library} at import time"
    for library, allowed in LAZY.items():
        if isinstance(allowed, int):
            assert len(found[library]) <= allowed, f"{library}: {found[library]}"
        else:
            assert found[library] <= allowed, f"{library}: {found[library]}"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("__init__.py")), ids=shown)
def test_init_has_only_a_docstring(path):
    body = ast.parse(path.read_text()).body
    assert len(body) == 1 and isinstance(body[0], ast.Expr), f"{path} has code"


def test_files_stay_short_and_flat():
    for path in FILES:
        assert len(path.read_text().splitlines()) < MAX_LINES, path
        assert len(path.relative_to(PACKAGE).parts) <= 2, f"{path} is too deep"
        assert path.stem not in ("utils", "misc", "helpers", "common"), path


def test_only_the_command_line_prints():
    for path in FILES:
        if path.name in ("cli.py", "show.py"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            called = node.func if isinstance(node, ast.Call) else None
            is_print = isinstance(called, ast.Name) and called.id == "print"
            assert not is_print, f"{shown(path)} line {node.lineno} prints"


def test_no_except_is_bare():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ExceptHandler):
                assert node.type is not None, f"{shown(path)} line {node.lineno}"
