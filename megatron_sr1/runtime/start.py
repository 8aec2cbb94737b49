"""How a run was started: its command, and the versions that it runs with.

Out: `start.json` of the run directory, which the report shows.
"""

from __future__ import annotations

import datetime
import shlex
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from megatron_sr1.runtime.versions import versions

START_FILE = "start.json"
GIT_SECONDS = 10.0


def start_facts(num_ranks: int) -> dict[str, Any]:
    """Return command, time (UTC), ranks and versions of this process."""
    commit = _commit()
    now = datetime.datetime.now(datetime.UTC)
    return {
        "command": shlex.join(["megatron-sr1", *sys.argv[1:]]),
        "time": now.strftime("%Y-%m-%d %H:%M:%S UTC"),
        "ranks": num_ranks,
        "versions": versions() | ({"commit": commit} if commit else {}),
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
