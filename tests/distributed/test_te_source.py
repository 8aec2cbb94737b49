"""The test double's arguments are the real package's: read from its wheel, which is not imported.

Needs a package index. Covers names and order of arguments, not what they do.
"""

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

DOUBLE = Path(__file__).resolve().parents[1] / "te_double" / "transformer_engine" / "pytorch"
REAL = {
    "Linear": "pytorch/module/linear.py",
    "LayerNormLinear": "pytorch/module/layernorm_linear.py",
    "RMSNorm": "pytorch/module/rmsnorm.py",
    "DotProductAttention": "pytorch/attention/dot_product_attention/dot_product_attention.py",
}
OTHERS = {
    "FP8GlobalStateManager": "pytorch/quantization.py",
    "get_cpu_offload_context": "pytorch/cpu_offload.py",
}


@pytest.fixture(scope="module", params=["2.9.0", "2.20.2"])
def wheel(request, tmp_path_factory):
    """Wheels of the oldest and the newest release that the `gpu` extra admits."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    what = f"transformer-engine=={request.param}"
    done = subprocess.run([*pip, "--dest", str(folder), what], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"{what} could not be downloaded: {done.stderr.strip().splitlines()[-1]}")
    return zipfile.ZipFile(next(folder.glob("*.whl")))


def read(wheel, path):
    return ast.parse(wheel.read(f"transformer_engine/{path}"))


def arguments(tree, class_name, function):
    """Names of a method's arguments, and whether it takes any other."""
    owner = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == class_name)
    found = next(n for n in owner.body if isinstance(n, ast.FunctionDef) and n.name == function)
    names = [a.arg for a in (*found.args.posonlyargs, *found.args.args, *found.args.kwonlyargs)]
    return names, found.args.kwarg is not None


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_layers_take_the_arguments_that_the_double_takes(wheel, name):
    double = ast.parse((DOUBLE / "__init__.py").read_text())
    for function in ("__init__", "forward"):
        if name == "RMSNorm" and function == "forward":
            continue  # the real one's is inherited
        ours, _ = arguments(double, name, function)
        theirs, takes_any = arguments(read(wheel, REAL[name]), name, function)
        assert takes_any or not set(ours) - set(theirs)
        assert [n for n in theirs if n in ours] == [n for n in ours if n in theirs]


@pytest.mark.slow
def test_the_other_names_exist(wheel):
    import_paths = {n.filename for n in wheel.infolist()}
    for name, path in OTHERS.items():
        if f"transformer_engine/{path}" not in import_paths:
            path = "pytorch/fp8.py"  # before quantization.py was split off
        names = {n.name for n in ast.walk(read(wheel, path)) if hasattr(n, "name")}
        assert name in names, (name, path)
