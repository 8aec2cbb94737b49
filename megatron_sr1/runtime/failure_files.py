"""Files of a failed run: `RUN/failure.json` (which rank and why) and `RUN/stacks/rank_N.txt`.

In: a failure. Out: the failure of this launch (the first that was recorded), and a summary for the
end of the output: the cause and where every rank was, unusual places first.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType

import psutil

FAILURE_FILE = "failure.json"
STACKS_FOLDER = "stacks"
MOST_PLACES, MOST_RANKS = 8, 8
WRITING_SECONDS = 1.0
_WHERE = re.compile(r"^was in (.*)$", re.MULTILINE)

log = logging.getLogger(__name__)


def launch_start() -> float:
    """Return the start of the process that started us, as Unix time: no rank is older.

    Under torchrun and srun that is the node's agent. An older failure file belongs to an earlier
    launch.
    """
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    return psutil.Process(os.getpid() if alone else os.getppid()).create_time()


def read_failure(run_dir: Path, since: float) -> dict | None:
    """Return the failure that a rank recorded after `since` (Unix seconds), or None.

    Returns:
        `{"rank", "cause", "code", "time", "launch"}`; `rank` is the one that failed; if it was
        killed, another one wrote the file.
    """
    try:
        failure = json.loads((run_dir / FAILURE_FILE).read_text())
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return None
    # A process's start time is coarse, and the clocks of machines differ a little.
    return failure if failure["time"] >= since - 1.0 else None


class Launch:
    """The failure file of one launch.

    Args:
        run_dir: run directory, shared by all ranks.
    """

    def __init__(self, run_dir: Path) -> None:
        """Remember what identifies this launch.

        Time is not enough: a command that is restarted at once begins within the same second.
        """
        self._run_dir, self._since = run_dir, launch_start()
        names = ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")
        self._name = " ".join(os.environ.get(name, "") for name in names)

    def failure(self) -> dict | None:
        """Return what a rank of this launch recorded, or None."""
        failure = read_failure(self._run_dir, self._since)
        return failure if failure and failure.get("launch") == self._name else None

    def record(self, rank: int, cause: str, code: int) -> dict:
        """Record a failure unless this launch has one already; return the recorded one."""
        failure = {"rank": rank, "cause": cause, "code": code, "time": time.time()}
        failure["launch"] = self._name
        target, text = self._run_dir / FAILURE_FILE, json.dumps(failure) + "\n"
        try:
            with open(target, "x") as file:  # if several ranks try at once, one succeeds
                file.write(text)
        except FileExistsError:
            until = time.monotonic() + WRITING_SECONDS
            while self._is_empty(target) and time.monotonic() < until:
                time.sleep(0.01)  # the other rank has created the file and is writing it
            recorded = self.failure()
            if recorded is not None:
                return recorded
            target.write_text(text)  # replaces an earlier launch's
        except OSError as error:
            log.error("%s could not be written: %s", target, error)
        return failure

    @staticmethod
    def _is_empty(path: Path) -> bool:
        with suppress(FileNotFoundError):
            return path.stat().st_size == 0
        return False

    def forget(self) -> None:
        """Remove the failure of an earlier launch."""
        if self.failure() is None:
            (self._run_dir / FAILURE_FILE).unlink(missing_ok=True)


def place(frame: FrameType | None) -> str:
    """Describe where a thread is: `all_reduce (torch/distributed/distributed_c10d.py:3078)`."""
    if frame is None:
        return "unknown"
    path = "/".join(Path(frame.f_code.co_filename).parts[-3:])
    return f"{frame.f_code.co_name} ({path}:{frame.f_lineno})"


def main_thread_frame() -> FrameType | None:
    """Return the main thread's innermost frame."""
    identity = threading.main_thread().ident
    return None if identity is None else sys._current_frames().get(identity)


def last_words(run_dir: Path, failure: dict, since: float) -> list[str]:
    """Summarize a failed run, for the end of its output.

    Args:
        run_dir: run directory.
        failure: as returned by `read_failure`.
        since: Unix time of the launch; older stack files belong to earlier ones.

    Returns:
        lines: the cause, then where the ranks were; the places of the fewest ranks first.
    """
    cause = f"megatron-sr1: error: rank {failure['rank']}: {failure['cause']}"
    folder = run_dir / STACKS_FOLDER
    ranks: dict[str, list[int]] = {}
    for path in folder.glob("rank_*.txt"):
        found = _WHERE.search(path.read_text(errors="replace"))
        if found and path.stat().st_mtime >= since - 1.0:
            ranks.setdefault(found[1], []).append(int(path.stem.removeprefix("rank_")))
    places = sorted(ranks.items(), key=lambda item: (len(item[1]), item[1]))
    lines = [f"  {_names(sorted(who))} in {where}" for where, who in places[:MOST_PLACES]]
    return [f"{cause} (stacks in {folder})", *lines]


def _names(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:MOST_RANKS]))
    more = f" and {len(ranks) - MOST_RANKS} more" if len(ranks) > MOST_RANKS else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}{more}"
