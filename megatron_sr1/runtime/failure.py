"""Failures are loud: deadlines, stack dumps, and one failed rank takes the others with it.

`guard` wraps a rank's main. What goes wrong in it is written to `RUN/failure.json` (who and why)
and each rank's stacks to `RUN/stacks/rank_N.txt`; a watcher thread on every rank looks for that
file and for passed deadlines, and ends the process with `os._exit`, which works while the main
thread sits in a collective. Ranks wait for each other's dumps, at most `LINGER_SECONDS`, as a
launcher kills the rest once the first is gone.

Two nets below the watcher need no Python: faulthandler's own timer, should the interpreter lock
be held past a deadline, and its handlers for SIGTERM and crashes, which dump before the end.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import NoReturn

import psutil

from megatron_sr1.errors import SR1Error

POLL_SECONDS = 0.25
LINGER_SECONDS = 5.0
BACKUP_SECONDS = 10.0
FAILURE_FILE = "failure.json"
STACKS_FOLDER = "stacks"

log = logging.getLogger(__name__)
_current: ContextVar[FailureWatch | None] = ContextVar("failure_watch", default=None)


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
        `{"rank", "cause", "code", "time", "restart"}`.
    """
    try:
        failure = json.loads((run_dir / FAILURE_FILE).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    # The clock behind a process's start is coarse and machines differ a little.
    return failure if failure["time"] >= since - 1.0 else None


class FailureWatch:
    """Watches one rank: its deadlines, and the failures of the others.

    Args:
        run_dir: run directory, seen by all ranks.
        rank: of this process in the world.
        world_size: ranks in the world.
    """

    def __init__(self, run_dir: Path, rank: int, world_size: int) -> None:
        """Open the stack file and start the watcher thread."""
        self.run_dir, self.rank, self.world_size = run_dir, rank, world_size
        self._since = launch_start()
        self._restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._deadlines: list[tuple[float, str, float]] = []
        self._lock = threading.Lock()
        self._ending = threading.Lock()
        self._stop = threading.Event()
        folder = run_dir / STACKS_FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        self._stacks = open(folder / f"rank_{rank}.txt", "w")  # noqa: SIM115
        faulthandler.enable(self._stacks)
        faulthandler.register(signal.SIGTERM, self._stacks, all_threads=True, chain=True)
        self._thread = threading.Thread(target=self._watch, name="failure-watch", daemon=True)
        self._thread.start()

    @contextmanager
    def deadline(self, phase: str, seconds: float) -> Iterator[None]:
        """End the process if the block takes longer; deadlines nest.

        Args:
            phase: what is being done, for the message.
            seconds: limit; 0 or less means none.
        """
        if seconds <= 0:
            yield
            return
        entry = (time.monotonic() + seconds, phase, seconds)
        with self._lock:
            self._deadlines.append(entry)
            self._arm_backup()
        try:
            yield
        finally:
            with self._lock:
                self._deadlines.remove(entry)
                self._arm_backup()

    def _arm_backup(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        if self._deadlines:
            left = min(self._deadlines)[0] - time.monotonic() + BACKUP_SECONDS
            faulthandler.dump_traceback_later(max(left, 0.1), exit=True, file=self._stacks)

    def _watch(self) -> None:
        while not self._stop.wait(POLL_SECONDS):
            with self._lock:
                first = min(self._deadlines, default=None)
            if first is not None and time.monotonic() > first[0]:
                self.fail(f"{first[1]} took longer than its deadline of {first[2]:g} s", code=1)
            peer = self._peer_failure()
            if peer is not None:
                self.fail(peer["cause"], code=1)

    def _peer_failure(self) -> dict | None:
        failure = read_failure(self.run_dir, self._since)
        return failure if failure and failure["restart"] == self._restart else None

    def fail(self, cause: str, code: int, trace: str = "") -> NoReturn:
        """Record the failure unless one is recorded, dump stacks, say why, end the process.

        Args:
            cause: one line.
            code: exit status.
            trace: formatted traceback, "" for none. It goes into the stack file, and to stderr
                too if this rank is the first to fail and `code` is not 2 (a user's error).
        """
        self._ending.acquire()  # the first of main thread and watcher; the other waits for the end
        try:
            with suppress(OSError):  # the disk may be full, and stderr a pipe that nobody reads
                self._tell(cause, code, trace)
            self._linger()
        finally:
            os._exit(code)

    def _tell(self, cause: str, code: int, trace: str) -> None:
        cause = " ".join(cause.split())  # one line
        first = self._record(cause, code)
        why = f"rank {first['rank']}: {first['cause']}"
        self._dump(cause if first["rank"] == self.rank else f"stopped by {why}", trace)
        if first["rank"] == self.rank:
            text = f"{trace if code != 2 else ''}megatron-sr1: error: {why}"
        elif first["cause"] == cause and first["code"] == 2:
            return  # all ranks met the same user's error: one has said it
        else:
            text = f"megatron-sr1: rank {self.rank} stops, because of {why}"
        if threading.current_thread() is threading.main_thread():
            sys.stdout.flush()
            sys.stderr.flush()
        os.write(2, (text + "\n").encode())

    def _record(self, cause: str, code: int) -> dict:
        """Write the failure file unless a rank of this launch has; returns the one that stands."""
        failure = {"rank": self.rank, "cause": cause, "code": code, "time": time.time()}
        failure["restart"] = self._restart
        target, text = self.run_dir / FAILURE_FILE, json.dumps(failure) + "\n"
        try:
            with open(target, "x") as file:  # of several ranks at once, one succeeds
                file.write(text)
        except FileExistsError:
            standing = self._peer_failure()
            if standing is not None:
                return standing
            target.write_text(text)  # over an earlier launch's
        except OSError as error:
            log.error("%s could not be written: %s", target, error)
        return failure

    def _dump(self, headline: str, trace: str) -> None:
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        self._stacks.write(f"{stamp} rank {self.rank}: {headline}\n{trace}\n")
        self._stacks.flush()
        faulthandler.dump_traceback(self._stacks, all_threads=True)

    def _linger(self) -> None:
        until = time.monotonic() + LINGER_SECONDS
        folder = self.run_dir / STACKS_FOLDER
        waiting = {folder / f"rank_{rank}.txt" for rank in range(self.world_size)}
        while waiting and time.monotonic() < until:
            waiting = {path for path in waiting if not (path.exists() and path.stat().st_size)}
            time.sleep(0.05)

    def close(self) -> None:
        """Stop watching after a good end; an empty stack file is removed."""
        self._stop.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        faulthandler.unregister(signal.SIGTERM)
        faulthandler.disable()
        self._stacks.close()
        path = Path(self._stacks.name)
        if path.exists() and path.stat().st_size == 0:
            path.unlink()
        with suppress(OSError):  # other ranks' files are in it, or another rank was quicker
            path.parent.rmdir()
        if self.rank == 0 and self._peer_failure() is None:
            (self.run_dir / FAILURE_FILE).unlink(missing_ok=True)  # an earlier launch's


@contextmanager
def guard(
    run_dir: str | Path, rank: int | None = None, world_size: int | None = None
) -> Iterator[FailureWatch]:
    """Around a rank's main: ends the process, and all other ranks, when the block raises.

    An `SR1Error` is one line and exit status 2; anything else a traceback and status 1. Leaving
    through `SystemExit` or Ctrl-C is passed on unchanged.

    Args:
        run_dir: run directory, made if absent.
        rank: of this process; from the environment if None.
        world_size: ranks; from the environment if None.
    """
    outer = _current.get()
    if outer is not None:  # a guard within a guard: the outer one ends the process
        yield outer
        return
    if rank is None:
        rank = int(os.environ.get("RANK", "0"))
    if world_size is None:
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
    watch = FailureWatch(Path(run_dir), rank, world_size)
    token = _current.set(watch)
    try:
        yield watch
    except SR1Error as error:
        watch.fail(str(error), code=2, trace=traceback.format_exc())
    except Exception as error:
        watch.fail(f"{type(error).__name__}: {error}", code=1, trace=traceback.format_exc())
    finally:
        _current.reset(token)
        watch.close()


def deadline(phase: str, seconds: float) -> AbstractContextManager[None]:
    """`FailureWatch.deadline` of the guard around us; without a guard, no deadline."""
    watch = _current.get()
    return nullcontext() if watch is None else watch.deadline(phase, seconds)
