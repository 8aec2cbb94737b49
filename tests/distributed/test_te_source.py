"""The test double's arguments are the real package's: read from its wheel, which is not imported.

So are the names and keywords by which Megatron-Core, as installed, makes FP8's recipes and enters
its regions. Needs a package index. Covers names and order of arguments, not what they do.
"""

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

DOUBLE = Path(__file__).resolve().parents[1] / "te_double" / "transformer_engine" / "pytorch"
RECIPE_DOUBLE = DOUBLE.parent / "common" / "recipe" / "__init__.py"
REAL = {
    "Linear": "pytorch/module/linear.py",
    "LayerNormLinear": "pytorch/module/layernorm_linear.py",
    "RMSNorm": "pytorch/module/rmsnorm.py",
    "DotProductAttention": "pytorch/attention/dot_product_attention/dot_product_attention.py",
}
OTHERS = {
    "FP8GlobalStateManager": "pytorch/quantization.py",
    "get_cpu_offload_context": "pytorch/cpu_offload.py",
    "checkpoint": "pytorch/distributed.py",
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


RECIPES = "common/recipe/__init__.py"
LEFT_OUT = {"override_linear_precision", "params_dtype", "device"}
"""Keywords that Megatron-Core hands DelayedScaling and no release has: pydantic's dataclasses leave
out what they do not know."""


def core_source(path):
    import megatron.core

    return ast.parse((Path(*megatron.core.__path__) / path).read_text())


def function_of(tree, name):
    """The first function of a name that is not a stand-in: the one with the longest body."""
    found = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == name]
    return max(found, key=lambda n: len(ast.dump(n)))


def calls(tree, name):
    """Keywords of every call of `...name(...)`."""
    return [
        {k.arg for k in n.keywords if k.arg}
        for n in ast.walk(tree)
        if isinstance(n, ast.Call) and getattr(n.func, "attr", getattr(n.func, "id", "")) == name
    ]


def fields_of(tree, class_name):
    owner = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == class_name)
    return {n.target.id for n in owner.body if isinstance(n, ast.AnnAssign)}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["Float8CurrentScaling", "Float8BlockScaling", "MXFP8BlockScaling"]
)
def test_recipes_have_the_fields_that_megatron_core_and_the_double_name(wheel, name):
    real = fields_of(read(wheel, RECIPES), name)
    made = calls(function_of(core_source("fp8_utils.py"), "get_fp8_recipe"), name)
    assert made and all(keywords <= real for keywords in made), (made, real)
    assert fields_of(ast.parse(RECIPE_DOUBLE.read_text()), name) <= real


@pytest.mark.slow
def test_delayed_scaling_takes_what_megatron_core_hands_it_or_leaves_it_out(wheel):
    tree = read(wheel, RECIPES)
    real = fields_of(tree, "DelayedScaling")
    core = core_source("extensions/transformer_engine.py")
    owner = next(n for n in core.body if getattr(n, "name", "") == "TEDelayedScaling")
    (keywords,) = calls(owner, "__init__")
    extra = {
        n.targets[0].slice.value
        for n in ast.walk(owner)
        if isinstance(n, ast.Assign) and isinstance(n.targets[0], ast.Subscript)
    }
    assert extra == {"fp8_dpa", "fp8_mha", "interval"}  # the last for releases before 1.8
    assert (keywords | extra) - real == {"override_linear_precision", "interval"}
    shared = function_of(core, "_get_extra_te_kwargs")
    named = {n.value for n in ast.walk(shared) if isinstance(n, ast.Constant)}
    assert LEFT_OUT - {"override_linear_precision"} <= named
    imports = [n for n in tree.body if isinstance(n, ast.ImportFrom)]
    origin = {a.name: n.module for n in imports for a in n.names}
    assert origin["dataclass"] == "pydantic.dataclasses" and not LEFT_OUT & real
    assert fields_of(ast.parse(RECIPE_DOUBLE.read_text()), "DelayedScaling") <= real
    members = next(n for n in tree.body if getattr(n, "name", "") == "Format").body
    names = {n.targets[0].id for n in members if isinstance(n, ast.Assign)}
    assert {"E4M3", "HYBRID"} <= names


@pytest.mark.slow
def test_fp8s_region_takes_the_arguments_that_megatron_core_names(wheel):
    tree = read(wheel, "pytorch/quantization.py")
    real = {a.arg for a in function_of(tree, "fp8_autocast").args.args}
    made = calls(function_of(core_source("fp8_utils.py"), "get_fp8_context"), "fp8_autocast")
    assert made and all(keywords <= real for keywords in made)
    double = function_of(ast.parse((DOUBLE / "fp8.py").read_text()), "fp8_autocast")
    assert {a.arg for a in double.args.args} <= real
    # Megatron-Core asks for them here and in their old place.
    for place, names in (
        ("pytorch/__init__.py", {"fp8_autocast"}),
        ("pytorch/fp8.py", {"FP8GlobalStateManager", "fp8_autocast"}),
    ):
        imports = [n for n in ast.walk(read(wheel, place)) if isinstance(n, ast.ImportFrom)]
        assert names <= {a.name for n in imports for a in n.names}, place
    linear = ast.walk(read(wheel, REAL["Linear"]))
    assert "save_original_input" in {n.attr for n in linear if isinstance(n, ast.Attribute)}
