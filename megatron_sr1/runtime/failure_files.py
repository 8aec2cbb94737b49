"""Files by which the ranks of a run learn of each other's failures.

`RUN/failure.json` holds the first failure of a launch: which rank and why. `RUN/stacks/rank_N.txt`
receives rank N's stacks, and says whether the rank is alive: it is locked, and the kernel releases
the lock when the process dies. SIGKILL and the kernel's out-of-memory killer leave no message, but
they free the lock.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, TextIO

import psutil

from megatron_sr1.errors import ConfigError

FAILURE_FILE = "failure.json"
STACKS_DIRECTORY = "stacks"
MOST_PLACES, MOST_RANKS = 8, 8
WRITING_SECONDS = 1.0
PATIENCE_SECONDS = 20.0
"""How long a launch that has just been killed may still hold its locks."""
_WHERE = re.compile(r"^was in (.*)$", re.MULTILINE)

log = logging.getLogger(__name__)


class Failure(NamedTuple):
    """The failure of a rank; if it was killed, another one recorded it.

    `cause` is one line, `code` the exit status, `time` that of the recording, Unix seconds.
    """

    rank: int
    cause: str
    code: int
    time: float = 0.0
    launch: str = ""


def read_failure(run_dir: Path, since: float) -> Failure | None:
    """Return the failure that a rank recorded after `since` (Unix seconds), or None."""
    try:
        failure = Failure(**json.loads((run_dir / FAILURE_FILE).read_text()))
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return None
    # A process's start time is coarse, and the clocks of machines differ a little.
    return failure if failure.time >= since - 1.0 else None


class Launch:
    """The failure file of one launch in a run directory, which all ranks share."""

    def __init__(self, run_dir: Path) -> None:
        """Remember what identifies this launch.

        A failure from before the start of the process that started this one (under torchrun and
        srun the node's agent) is of an earlier launch: no rank is older. Time alone is not enough,
        as a command that is restarted at once begins within the same second.
        """
        self._path = run_dir / FAILURE_FILE
        single = int(os.environ.get("WORLD_SIZE", "1")) == 1
        self._since = psutil.Process(os.getpid() if single else os.getppid()).create_time()
        names = ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")
        self._name = " ".join(os.environ.get(name, "") for name in names)

    def failure(self) -> Failure | None:
        """Return the failure that a rank of this launch recorded, or None."""
        failure = read_failure(self._path.parent, self._since)
        return failure if failure is not None and failure.launch == self._name else None

    def record(self, failure: Failure) -> Failure:
        """Record a failure unless this launch has one already; return the recorded one."""
        failure = failure._replace(time=time.time(), launch=self._name)
        text = json.dumps(failure._asdict()) + "\n"
        try:
            with open(self._path, "x") as file:  # if several ranks try at once, one succeeds
                file.write(text)
        except FileExistsError:
            until = time.monotonic() + WRITING_SECONDS
            while self._is_empty() and time.monotonic() < until:
                time.sleep(0.01)  # the other rank has created the file and is writing it
            recorded = self.failure()
            if recorded is not None:
                return recorded
            self._path.write_text(text)  # replaces an earlier launch's
        except OSError as error:
            log.error("%s could not be written: %s", self._path, error)
        return failure

    def _is_empty(self) -> bool:
        with suppress(FileNotFoundError):
            return self._path.stat().st_size == 0
        return False

    def forget(self) -> None:
        """Remove the failure of an earlier launch."""
        if self.failure() is None:
            self._path.unlink(missing_ok=True)


class Presence:
    """The stack file and lock of this rank, and a check of the next rank's lock.

    Each rank watches only the next one, so that the cost does not depend on the number of ranks. A
    rank counts as dead only if it was seen to hold its lock: on a file system without locks, or
    whose locks are local to each host, no rank is ever taken for dead. `file` is `rank_N.txt`,
    empty and open for writing.
    """

    def __init__(self, directory: Path, rank: int, world_size: int) -> None:
        """Open and lock the file in the directory of stack files, which all ranks share."""
        self._next = (rank + 1) % world_size if world_size > 1 else None
        self._directory, self._seen = directory, False
        self.file = self._open(rank)
        self.file.truncate(0)

    def _open(self, rank: int) -> TextIO:
        path, until = self._directory / f"rank_{rank}.txt", time.monotonic() + PATIENCE_SECONDS
        run_dir = self._directory.parent
        while True:
            try:
                self._directory.mkdir(parents=True, exist_ok=True)
                file: TextIO = open(path, "a")  # noqa: SIM115
            except OSError as error:
                # Another rank removes the directory when it ends.
                if isinstance(error, FileNotFoundError) and time.monotonic() < until:
                    time.sleep(0.01)
                    continue
                problem = f"cannot be written to ({error.strerror}: {error.filename})"
                advice = "choose another directory, or make this one writable"
                raise ConfigError(f"output={run_dir} {problem}; {advice}") from None
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.close()
                if time.monotonic() > until:
                    problem = f"another process is rank {rank} of this run"
                    advice = "wait for that run or stop it, or choose another output"
                    raise ConfigError(f"{run_dir}: {problem}; {advice}") from None
                time.sleep(0.1)
                continue
            except OSError:  # no locks on this file system
                return file
            if os.fstat(file.fileno()).st_nlink:
                return file
            file.close()  # it was removed between opening and locking

    def gone(self) -> int | None:
        """Return the next rank if it was alive and its process died; None otherwise."""
        if self._next is None:
            return None
        try:
            with open(self._directory / f"rank_{self._next}.txt", "r+") as file:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                ended_well = os.fstat(file.fileno()).st_nlink == 0
                return self._next if self._seen and not ended_well else None
        except BlockingIOError:
            self._seen = True
        except OSError:  # it does not exist yet, or was removed after a normal end
            pass
        return None

    def leave(self) -> None:
        """Remove the file, then release the lock, so that this rank is not taken for dead."""
        Path(self.file.name).unlink(missing_ok=True)
        self.file.close()
        with suppress(OSError):  # other ranks' files are in it, or another rank removed it
            self._directory.rmdir()


def summarize_failure(run_dir: Path, failure: Failure, since: float) -> list[str]:
    """Return lines for the end of a failed run's output: the cause, then where the ranks were.

    The places of the fewest ranks come first. Stack files from before `since`, the Unix time of the
    launch, belong to earlier launches.
    """
    cause = f"megatron-sr1: error: rank {failure.rank}: {failure.cause}"
    directory = run_dir / STACKS_DIRECTORY
    ranks: dict[str, list[int]] = {}
    for path in directory.glob("rank_*.txt"):
        found = _WHERE.search(path.read_text(errors="replace"))
        if found and path.stat().st_mtime >= since - 1.0:
            ranks.setdefault(found[1], []).append(int(path.stem.removeprefix("rank_")))
    places = sorted(ranks.items(), key=lambda item: (len(item[1]), item[1]))
    lines = [f"  {name_ranks(sorted(who))} in {where}" for where, who in places[:MOST_PLACES]]
    return [f"{cause} (stacks in {directory})", *lines]


def name_ranks(ranks: list[int]) -> str:
    """Return "rank 3", "ranks 0, 1" or "ranks 0, 1, … and 9 more"."""
    shown = ", ".join(map(str, ranks[:MOST_RANKS]))
    more = f" and {len(ranks) - MOST_RANKS} more" if len(ranks) > MOST_RANKS else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}{more}"
