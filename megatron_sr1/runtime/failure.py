"""Failure handling: deadlines, stack dumps, and the end of all ranks when one of them fails.

`guard` wraps a rank's main function. A failure is recorded in `RUN/failure.json`, and each rank
dumps its stacks to `RUN/stacks/rank_N.txt`. A watcher thread on every rank checks for that file,
for missed deadlines, for SIGTERM, for the death of the next rank and of the process that started
this one. It ends the process with `os._exit`, which works while the main thread is blocked in a
collective. Ranks wait up to `LINGER_SECONDS` for each other's dumps, because a launcher kills the
remaining ranks once the first one has exited.

Two fallbacks need no Python: faulthandler's timer, in case the interpreter lock is held past a
deadline, and its handlers for SIGTERM and crashes, which dump the stacks first.
"""

from __future__ import annotations

import faulthandler
import math
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import NoReturn

from megatron_sr1.errors import SR1Error
from megatron_sr1.runtime.failure_files import STACKS_DIRECTORY, Failure, Launch, Presence
from megatron_sr1.runtime.signals import end_children

POLL_SECONDS = 0.25
MOMENT_SECONDS = 1.0
LINGER_SECONDS = 5.0
BACKUP_SECONDS = 10.0
GONE = "its process is gone (killed from outside, or out of memory)"

_current: ContextVar[FailureWatch | None] = ContextVar("failure_watch", default=None)


class FailureWatch:
    """Watches one rank: its deadlines, and failures of other ranks.

    `phase` is the innermost `deadline` block, "" outside; after an exception, where it was raised.
    """

    def __init__(self, run_dir: Path) -> None:
        """Start watching in a run directory, which all ranks share; `guard` reports errors."""
        self.rank = int(os.environ.get("RANK", "0"))
        self.world_size = int(os.environ.get("WORLD_SIZE", "1"))
        self._launch, self._parent = Launch(run_dir), os.getppid()
        self.presence = Presence(run_dir / STACKS_DIRECTORY, self.rank, self.world_size)
        self._stacks = self.presence.file
        self._deadlines: list[tuple[float, str, float]] = []
        self._backed_until = math.inf  # the deadline for which faulthandler's timer is set
        self.phase = ""
        self._lock = threading.Lock()
        self._ending = threading.Lock()
        self._stop = threading.Event()
        faulthandler.enable(self._stacks)
        self._listen()
        self._thread = threading.Thread(target=self._watch, name="failure-watch", daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        """On SIGTERM, dump the stacks at once and write to a pipe, which the watcher reads.

        A Python handler alone would run only after the main thread has returned from C.
        """
        self._unlisten = ExitStack()
        self._pipe, write_end = os.pipe()
        for end in (self._pipe, write_end):
            os.set_blocking(end, False)
            self._unlisten.callback(os.close, end)
        before = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
        self._unlisten.callback(signal.set_wakeup_fd, before)
        handler = signal.signal(signal.SIGTERM, lambda number, frame: None)
        self._unlisten.callback(signal.signal, signal.SIGTERM, handler)
        faulthandler.register(signal.SIGTERM, self._stacks, all_threads=True, chain=True)
        self._unlisten.callback(faulthandler.unregister, signal.SIGTERM)
        # A forked child is no rank and may be terminated.
        os.register_at_fork(after_in_child=self._unlisten.close)

    @contextmanager
    def deadline(self, phase: str, seconds: float) -> Iterator[None]:
        """End the process if the block takes longer; 0 or less means no limit; deadlines nest."""
        outer, self.phase = self.phase, phase  # kept if the block raises
        entries = [(time.monotonic() + seconds, phase, seconds)] if seconds > 0 else []
        with self._lock:
            self._deadlines += entries
            if any(until < self._backed_until for until, *_ in entries):
                self._set_backup()
        try:
            yield
            self.phase = outer
        finally:
            with self._lock:
                for entry in entries:
                    self._deadlines.remove(entry)  # `_watch` sets the timer, if one is left at all

    def _set_backup(self) -> None:
        """Set faulthandler's timer for the first deadline; each call ends and starts a thread."""
        first = min((until for until, *_ in self._deadlines), default=math.inf)
        if first == self._backed_until:
            return
        faulthandler.cancel_dump_traceback_later()
        self._backed_until = first
        if first < math.inf:
            left = first - time.monotonic() + BACKUP_SECONDS
            faulthandler.dump_traceback_later(max(left, 0.1), exit=True, file=self._stacks)

    def _watch(self) -> None:
        while not self._stop.wait(POLL_SECONDS):
            culprit = self.culprit()
            if culprit is not None:
                self.fail(culprit.cause, 1, culprit=culprit)
            if self._terminated():
                culprit = self.culprit(MOMENT_SECONDS)  # a launcher stops the others after a death
                self.fail("stopped from outside by SIGTERM", 128 + signal.SIGTERM, culprit=culprit)
            if self.world_size > 1 and os.getppid() != self._parent:
                self.fail("the process that started this rank is gone", 1)
            with self._lock:
                first = min(self._deadlines, default=None)
                self._set_backup()
            if first is not None and time.monotonic() > first[0]:
                self.fail(f"{first[1]} took longer than its deadline of {first[2]:g} s", 1)

    def culprit(self, patience_seconds: float = 0.0) -> Failure | None:
        """Return an earlier failure of another rank; wait up to `patience_seconds` for one."""
        until = time.monotonic() + patience_seconds
        while self.world_size > 1:
            failure, gone = self._launch.failure(), self.presence.gone()
            if failure is not None:
                return failure
            if gone is not None:
                return Failure(gone, GONE, 1)
            if time.monotonic() >= until:
                break
            time.sleep(0.05)
        return None

    def _terminated(self) -> bool:
        with suppress(BlockingIOError):
            return signal.SIGTERM in os.read(self._pipe, 4096)
        return False

    def fail(
        self, cause: str, code: int, trace: str = "", culprit: Failure | None = None
    ) -> NoReturn:
        """Record the failure unless there is one, dump the stacks, log why, and exit.

        `code` is the exit status, 2 for a user's error. `trace` is written to the stack file, and
        to stderr if this rank is the first to fail and its user is not to blame. `culprit` is the
        failure of another rank that ends this one; None if this one failed.
        """
        self._ending.acquire()  # main thread or watcher, whichever is first; the other one waits
        try:
            own = Failure(self.rank, " ".join(cause.split()), code)
            with suppress(OSError):  # the disk may be full, or nobody may read stderr
                self._report(own, trace, culprit or own)
            self._linger(culprit)
            end_children()
        finally:
            os._exit(code)

    def _report(self, own: Failure, trace: str, culprit: Failure) -> None:
        first = self._launch.record(culprit)
        why, is_ours = f"rank {first.rank}: {first.cause}", first.rank == self.rank
        in_main = threading.current_thread() is threading.main_thread()
        where = (self.phase or "no phase") + ("" if in_main else f", {_main_thread_place()}")
        headline = f"{own.cause if is_ours else f'stopped by {why}'}\nwas in {where}"
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        self._stacks.write(f"{stamp} rank {self.rank}: {headline}\n{trace}\n")
        self._stacks.flush()
        faulthandler.dump_traceback(self._stacks, all_threads=True)
        if is_ours:
            text = f"{trace if own.code != 2 else ''}megatron-sr1: error: {why}"
        elif first.code == 2:
            return  # a user's error, already reported; where the other ranks were does not help
        else:
            text = f"megatron-sr1: rank {self.rank} stops in {where}, because of {why}"
        if in_main:
            sys.stdout.flush()
            sys.stderr.flush()
        os.write(2, (text + "\n").encode())

    def _linger(self, culprit: Failure | None) -> None:
        until = time.monotonic() + LINGER_SECONDS
        dead = culprit.rank if culprit is not None and culprit.cause == GONE else None
        others = (rank for rank in range(self.world_size) if rank != dead)
        waiting = {Path(self._stacks.name).with_name(f"rank_{rank}.txt") for rank in others}
        while waiting and time.monotonic() < until:
            waiting = {path for path in waiting if not (path.exists() and path.stat().st_size)}
            time.sleep(0.05)

    def close(self) -> None:
        """Stop watching after a normal end, and remove the stack file."""
        self._stop.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        self._unlisten.close()
        faulthandler.disable()
        self.presence.leave()
        if self.rank == 0:
            self._launch.forget()


def _main_thread_place() -> str:
    """Describe where the main thread is: `all_reduce (torch/distributed/c10d.py:3078)`."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    if frame is None:
        return "unknown"
    path = "/".join(Path(frame.f_code.co_filename).parts[-3:])
    return f"{frame.f_code.co_name} ({path}:{frame.f_lineno})"


@contextmanager
def guard(run_dir: str | Path) -> Iterator[FailureWatch]:
    """Run a rank's main function; if it raises, end this process and all other ranks.

    An `SR1Error` is reported as one line, with exit status 2; other exceptions with a traceback and
    status 1. `SystemExit` and Ctrl-C pass through. In another guard, it does nothing. The run
    directory is created if absent. Raise a ConfigError if that fails, or if another process is this
    rank of the same directory.
    """
    outer = _current.get()
    if outer is not None:
        yield outer
        return
    watch = FailureWatch(Path(run_dir))
    token = _current.set(watch)
    try:
        yield watch
    except Exception as error:
        if isinstance(error, SR1Error):
            cause, code = str(error), 2
        else:
            where = f" (in {watch.phase})" if watch.phase else ""
            cause, code = f"{type(error).__name__}: {error}{where}", 1
        # The cause of any exception may be another rank's death, e.g. through a broken connection.
        watch.fail(cause, code, traceback.format_exc(), watch.culprit(MOMENT_SECONDS))
    finally:
        _current.reset(token)
        watch.close()


def see_others() -> None:
    """Check the next rank once all are up, so that a death before the next poll is noticed too."""
    watch = _current.get()
    if watch is not None:
        watch.presence.gone()


def deadline(phase: str, seconds: float) -> AbstractContextManager[None]:
    """Return `FailureWatch.deadline` of the enclosing guard; without a guard, no deadline."""
    watch = _current.get()
    return nullcontext() if watch is None else watch.deadline(phase, seconds)
