"""What a failed run leaves: `RUN/failure.json`, who and why, and `RUN/stacks/rank_N.txt`.

In: a failure. Out: the one that stands for the launch (the first that was written), and the last
words about it: the cause, and where every rank was, the odd ones first.
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
    """Unix time before which no rank of this launch ran: the start of the process that forked us.

    Under torchrun and srun that is the node's agent. A failure file older than it is an earlier
    launch's.
    """
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    return psutil.Process(os.getpid() if alone else os.getppid()).create_time()


def read_failure(run_dir: Path, since: float) -> dict | None:
    """The failure that a rank recorded after `since` (unix seconds), or None.

    Returns:
        `{"rank", "cause", "code", "time", "launch"}`; `rank` is the one that failed, which is not
        the one that wrote it where that was killed.
    """
    try:
        failure = json.loads((run_dir / FAILURE_FILE).read_text())
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return None
    # The clock behind a process's start is coarse and machines differ a little.
    return failure if failure["time"] >= since - 1.0 else None


class Launch:
    """The failure file as one launch sees it.

    Args:
        run_dir: run directory, seen by all ranks.
    """

    def __init__(self, run_dir: Path) -> None:
        """Remember what tells this launch from others.

        Time alone does not: a command that is started again at once begins within the second.
        """
        self._run_dir, self._since = run_dir, launch_start()
        names = ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")
        self._name = " ".join(os.environ.get(name, "") for name in names)

    def failure(self) -> dict | None:
        """What a rank of this launch recorded, or None."""
        failure = read_failure(self._run_dir, self._since)
        return failure if failure and failure.get("launch") == self._name else None

    def record(self, rank: int, cause: str, code: int) -> dict:
        """Write a failure unless a rank of this launch has; returns the one that stands."""
        failure = {"rank": rank, "cause": cause, "code": code, "time": time.time()}
        failure["launch"] = self._name
        target, text = self._run_dir / FAILURE_FILE, json.dumps(failure) + "\n"
        try:
            with open(target, "x") as file:  # of several ranks at once, one succeeds
                file.write(text)
        except FileExistsError:
            until = time.monotonic() + WRITING_SECONDS
            while self._is_empty(target) and time.monotonic() < until:
                time.sleep(0.01)  # the other rank has made the file and writes it now
            standing = self.failure()
            if standing is not None:
                return standing
            target.write_text(text)  # over an earlier launch's
        except OSError as error:
            log.error("%s could not be written: %s", target, error)
        return failure

    @staticmethod
    def _is_empty(path: Path) -> bool:
        with suppress(FileNotFoundError):
            return path.stat().st_size == 0
        return False

    def forget(self) -> None:
        """Remove an earlier launch's failure."""
        if self.failure() is None:
            (self._run_dir / FAILURE_FILE).unlink(missing_ok=True)


def place(frame: FrameType | None) -> str:
    """Where a thread is, as `all_reduce (torch/distributed/distributed_c10d.py:3078)`."""
    if frame is None:
        return "unknown"
    path = "/".join(Path(frame.f_code.co_filename).parts[-3:])
    return f"{frame.f_code.co_name} ({path}:{frame.f_lineno})"


def main_thread_frame() -> FrameType | None:
    """The main thread's innermost frame."""
    identity = threading.main_thread().ident
    return None if identity is None else sys._current_frames().get(identity)


def last_words(run_dir: Path, failure: dict, since: float) -> list[str]:
    """Lines that end a failed run's output.

    Args:
        run_dir: run directory.
        failure: as `read_failure` returned it.
        since: unix time of the launch; older stack files are an earlier one's.

    Returns:
        the cause; below it where the ranks were, those alone in a place first.
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
